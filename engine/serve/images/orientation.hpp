// Which way is up: EXIF's and XMP's orientation, as engine/data/images.py reads it, and turning.
#pragma once

#include <string_view>

#include "bundle/files.hpp"
#include "images/image.hpp"

namespace vesalius {

// The orientation of a TIFF block of tags ("Exif\0\0" before it may stay); 0 where it says none.
int exif_orientation(Bytes block);
// tiff:Orientation of an XMP packet; 0 where it says none.
int xmp_orientation(std::string_view packet);
// The tags that ImageMagick writes as text: three lines, then hexadecimal digits. 0 where they say none.
int raw_profile_orientation(std::string_view text);

// The image as it is to be shown; 1, and what is none of 1 to 8, leaves it.
Image turn_upright(Image image, int orientation);

}  // namespace vesalius
