#pragma once

#include <string>
#include <string_view>

#include "bundle/files.hpp"

namespace vesalius {

std::string encode_base64(Bytes content);
// InputError where it is not base64 (RFC 4648, padded).
std::string decode_base64(std::string_view text);
// The content of "data:image/png;base64,...", or of a JPEG's; InputError for any other.
std::string decode_data_uri(std::string_view uri);

}  // namespace vesalius
