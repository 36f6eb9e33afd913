// The next token from its logits: the likeliest, or drawn, as kernels/sample.py has it.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace vesalius {

struct Sampling {
    double temperature = 0;  // 0: the likeliest token
    std::uint64_t seed = 0;
    double top_p = 1;  // drawn from the fewest tokens whose probabilities sum to this; of equal ones at its edge, from the later
};

class Sampler {
 public:
    // `penalty`: of tokens that prompt or answer have already, as transformers' repetition_penalty; 1: none.
    Sampler(const Sampling& sampling, double penalty, std::int64_t vocabulary);

    // The token is there from now on.
    void see(std::int64_t token);
    // std::runtime_error where no logit is the largest, since one is not a number.
    std::int64_t pick(std::span<const float> logits) { return pick(logits, static_cast<double>(random_() >> 11) * 0x1p-53); }
    // At a number of [0, 1) instead of one that is drawn.
    std::int64_t pick(std::span<const float> logits, double uniform);

 private:
    void cut(std::vector<double>& weights) const;

    Sampling sampling_;
    float penalty_;
    std::vector<bool> seen_;
    std::vector<float> weighed_;
    std::mt19937_64 random_;
};

}  // namespace vesalius
