#include "images/scaling.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace vesalius {
namespace {

constexpr int OFFSET = 1 << 14, OFFSET_SPAN = 1 << 13;

std::vector<std::uint8_t> scale(const std::vector<std::uint16_t>& values, int low, int high) {
    std::array<std::uint8_t, 65536> table{};
    const double factor = high == low ? 0 : 255.0 / (high - low);
    for (int value = 0; value < 65536; ++value) {
        // std::nearbyint rounds halves to even, as numpy does.
        table[static_cast<std::size_t>(value)] =
            static_cast<std::uint8_t>(std::nearbyint(std::clamp((value - low) * factor, 0.0, 255.0)));
    }
    std::vector<std::uint8_t> scaled(values.size());
    std::ranges::transform(values, scaled.begin(), [&](std::uint16_t value) { return table[value]; });
    return scaled;
}

}  // namespace

std::vector<std::uint8_t> scale_deep(const std::vector<std::uint16_t>& values) {
    const int high = values.empty() ? 0 : *std::ranges::max_element(values);
    if (high >= OFFSET) {
        int measured = high;
        for (const std::uint16_t value : values) {
            if (value > 0) measured = std::min<int>(measured, value);
        }
        if (measured >= OFFSET && high > measured && high - measured <= OFFSET_SPAN) return scale(values, measured, high);
    }
    static constexpr std::array<int, 5> depths{8, 10, 12, 14, 16};
    const int bits = *std::ranges::find_if(depths, [&](int depth) { return high < 1 << depth; });
    return scale(values, 0, (1 << bits) - 1);
}

}  // namespace vesalius
