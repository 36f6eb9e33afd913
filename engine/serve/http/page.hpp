#pragma once

#include <string_view>

namespace vesalius {

// page.html
extern const std::string_view PAGE;

}  // namespace vesalius
