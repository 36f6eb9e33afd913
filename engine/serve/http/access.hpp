// Who may ask: a token, and names of this machine.
#pragma once

#include <string_view>

namespace vesalius {

// Whether an Authorization header carries the token; takes the same time wherever they differ.
bool carries_token(std::string_view authorization, std::string_view token);

// Whether a Host header names this machine itself. A page of another site that has its name resolve to 127.0.0.1 does not.
bool names_loopback(std::string_view host);

}  // namespace vesalius
