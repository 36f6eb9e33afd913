// Pixels in rows, eight bits a channel.
#pragma once

#include <cstdint>
#include <vector>

namespace vesalius {

template <int C>
struct Pixels {
    int width = 0, height = 0;
    std::vector<std::uint8_t> values;  // [height, width, C]

    Pixels() = default;
    Pixels(int wide, int high) : width(wide), height(high), values(static_cast<std::size_t>(wide) * high * C) {}

    std::uint8_t* row(int y) { return values.data() + static_cast<std::size_t>(y) * width * C; }
    const std::uint8_t* row(int y) const { return values.data() + static_cast<std::size_t>(y) * width * C; }
};

using Image = Pixels<3>;  // RGB
using Mask = Pixels<1>;   // 0 and 255

}  // namespace vesalius
