// For tests: sampler_probe reads lines of JSON [logits, temperature, top_p, uniform] and prints the token of each.
#include <iostream>
#include <nlohmann/json.hpp>

#include "vlm/sampler.hpp"

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        const auto asked = nlohmann::json::parse(line);
        const auto logits = asked.at(0).get<std::vector<float>>();
        vesalius::Sampler sampler({asked.at(1), 0, asked.at(2)}, 1, static_cast<std::int64_t>(logits.size()));
        std::cout << sampler.pick(logits, asked.at(3)) << '\n';
    }
}
