#pragma once

#include <cstdint>
#include <vector>

namespace vesalius {

// Values of 16 bits -> 0-255, as engine/data/decoders/scaling.py: scale_deep has it: from 0 to the smallest of 8, 10, 12, 14 and 16
// bits that holds their maximum, or, where they are signed ones stored with an offset, from their own minimum to their maximum.
std::vector<std::uint8_t> scale_deep(const std::vector<std::uint16_t>& values);

}  // namespace vesalius
