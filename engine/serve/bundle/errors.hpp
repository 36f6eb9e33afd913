// What a user can mend: a file, a flag, a request. Its message is one line that says what was expected.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace vesalius {

struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a decoder or a library says, fit for one line: its first line, shortened, control characters as blanks.
std::string one_line(std::string_view text, std::size_t longest = 200);

}  // namespace vesalius
