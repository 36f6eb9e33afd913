#include "vlm/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace vesalius {

Sampler::Sampler(const Sampling& sampling, double penalty, std::int64_t vocabulary)
    : sampling_(sampling),
      penalty_(static_cast<float>(penalty)),
      seen_(static_cast<std::size_t>(vocabulary)),
      random_(sampling.seed) {}

void Sampler::see(std::int64_t token) { seen_.at(static_cast<std::size_t>(token)) = true; }

std::int64_t Sampler::pick(std::span<const float> logits) {
    weighed_.assign(logits.begin(), logits.end());
    if (penalty_ != 1.0F) {
        for (std::size_t token = 0; token < weighed_.size(); ++token) {
            float& logit = weighed_[token];
            if (seen_[token]) logit = logit < 0 ? logit * penalty_ : logit / penalty_;
        }
    }
    if (std::ranges::any_of(weighed_, [](float logit) { return std::isnan(logit); }))
        throw std::runtime_error("the model gave logits that are not numbers");
    const auto likeliest = std::ranges::max_element(weighed_);
    if (sampling_.temperature <= 0) return likeliest - weighed_.begin();

    // The softmax of logits / temperature, and the token at which its sum passes a number drawn from [0, 1).
    std::vector<double> sums(weighed_.size());
    double sum = 0;
    for (std::size_t token = 0; token < sums.size(); ++token) {
        sum += std::exp((static_cast<double>(weighed_[token]) - *likeliest) / sampling_.temperature);
        sums[token] = sum;
    }
    const double drawn = static_cast<double>(random_() >> 11) * 0x1p-53 * sum;
    return std::min(std::ranges::upper_bound(sums, drawn), std::prev(sums.end())) - sums.begin();
}

}  // namespace vesalius
