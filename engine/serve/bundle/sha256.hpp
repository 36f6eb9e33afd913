#pragma once

#include <string>

#include "bundle/files.hpp"

namespace vesalius {

// 64 hexadecimal digits.
std::string sha256(Bytes content);

}  // namespace vesalius
