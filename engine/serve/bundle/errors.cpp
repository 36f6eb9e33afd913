#include "bundle/errors.hpp"

namespace vesalius {

std::string one_line(std::string_view text, std::size_t longest) {
    std::string line(text.substr(0, std::min(text.find('\n'), longest)));
    for (char& letter : line) {
        if (static_cast<unsigned char>(letter) < 32 || letter == 127) letter = ' ';
    }
    return line;
}

}  // namespace vesalius
