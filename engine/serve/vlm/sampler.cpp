#include "vlm/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace vesalius {

Sampler::Sampler(const Sampling& sampling, double penalty, std::int64_t vocabulary)
    : sampling_(sampling),
      penalty_(static_cast<float>(penalty)),
      seen_(static_cast<std::size_t>(vocabulary)),
      random_(sampling.seed) {}

void Sampler::see(std::int64_t token) { seen_.at(static_cast<std::size_t>(token)) = true; }

std::int64_t Sampler::pick(std::span<const float> logits, double uniform) {
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

    // The softmax of logits / temperature, and the token at which its sum passes the number.
    std::vector<double> sums(weighed_.size());
    for (std::size_t token = 0; token < sums.size(); ++token) {
        sums[token] = std::exp((static_cast<double>(weighed_[token]) - *likeliest) / sampling_.temperature);
    }
    if (sampling_.top_p < 1) cut(sums);
    std::partial_sum(sums.begin(), sums.end(), sums.begin());
    const auto found = std::ranges::upper_bound(sums, uniform * sums.back());
    return (found == sums.end() ? likeliest : weighed_.begin() + (found - sums.begin())) - weighed_.begin();  // it may round up
}

// Weights of tokens that stay, 0 of the others: a token stays where the larger weights together are less than top_p of all. A heap
// gives the largest ones without sorting the vocabulary.
void Sampler::cut(std::vector<double>& weights) const {
    std::vector<std::pair<double, std::size_t>> heap(weights.size());
    double left = 0;
    for (std::size_t token = 0; token < heap.size(); ++token) {
        heap[token] = {weights[token], token};
        left += weights[token];
    }
    left *= sampling_.top_p;
    std::ranges::fill(weights, 0);
    std::ranges::make_heap(heap);
    do {
        std::ranges::pop_heap(heap);
        const auto [weight, token] = heap.back();
        heap.pop_back();
        weights[token] = weight;
        left -= weight;
    } while (left > 0 && !heap.empty());
}

}  // namespace vesalius
