// Resizing as PIL does it, bit for bit: separable filters whose weights are 22-bit integers, each pass rounded to eight bits.
#pragma once

#include <string_view>

#include "images/image.hpp"

namespace vesalius {

enum class Filter { nearest, bilinear, bicubic };

Filter filter_named(std::string_view name);  // InputError for any other

Image resize(const Image& image, int width, int height, Filter filter);

}  // namespace vesalius
