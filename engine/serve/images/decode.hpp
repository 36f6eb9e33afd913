// PNG and JPEG files as upright 8-bit RGB, equal to engine/data/images.py: recognised by their content, alpha dropped, deeper
// values scaled as engine/data/decoders/scaling.py does.
#pragma once

#include <cstddef>
#include <string>

#include "bundle/files.hpp"
#include "images/image.hpp"

namespace vesalius {

constexpr std::size_t MOST_PIXELS = 89'478'485;  // PIL's own bound
constexpr std::size_t LARGEST_IMAGE_FILE = std::size_t{1} << 30;

// InputError, `name`: the reason, where it is no whole image, of another kind, or has more than `most_pixels`.
Image decode_image(Bytes file, const std::string& name, std::size_t most_pixels = MOST_PIXELS);
Image open_image(const std::string& path);

// The decoders themselves. InputError with the reason alone.
Image decode_png(Bytes file, std::size_t most_pixels);
Image decode_jpeg(Bytes file, std::size_t most_pixels);

// A PNG of 8-bit grey.
std::string encode_png(const Mask& mask);

}  // namespace vesalius
