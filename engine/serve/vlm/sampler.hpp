// The next token from its logits: the likeliest, or drawn.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace vesalius {

struct Sampling {
    double temperature = 0;  // 0: the likeliest token
    std::uint64_t seed = 0;
};

class Sampler {
 public:
    // `penalty`: of tokens that prompt or answer have already, as transformers' repetition_penalty; 1: none.
    Sampler(const Sampling& sampling, double penalty, std::int64_t vocabulary);

    // The token is there from now on.
    void see(std::int64_t token);
    // std::runtime_error where no logit is the largest, since one is not a number.
    std::int64_t pick(std::span<const float> logits);

 private:
    Sampling sampling_;
    float penalty_;
    std::vector<bool> seen_;
    std::vector<float> weighed_;
    std::mt19937_64 random_;
};

}  // namespace vesalius
