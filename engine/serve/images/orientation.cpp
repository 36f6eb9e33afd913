#include "images/orientation.hpp"

#include <cctype>
#include <string>
#include <utility>

namespace vesalius {
namespace {

constexpr std::uint32_t ORIENTATION = 274, SHORT = 3, LONG = 4, BYTE = 1;

// Numbers of a TIFF block in its own byte order; beyond its end they are 0.
class Block {
 public:
    explicit Block(Bytes bytes) : bytes_(bytes), little_(bytes.size() > 1 && bytes[0] == 'I' && bytes[1] == 'I') {}

    bool is_tiff() const {
        const bool big = bytes_.size() > 1 && bytes_[0] == 'M' && bytes_[1] == 'M';
        return (little_ || big) && number(2, 2) == 42;
    }
    std::uint32_t number(std::size_t at, int size) const {
        std::uint32_t value = 0;
        for (int i = 0; i < size; ++i) {
            const std::size_t place = at + static_cast<std::size_t>(little_ ? size - 1 - i : i);
            value = value << 8 | (place < bytes_.size() ? bytes_[place] : 0);
        }
        return value;
    }
    std::size_t size() const { return bytes_.size(); }

 private:
    Bytes bytes_;
    bool little_;
};

int valid(std::uint32_t orientation) { return orientation >= 1 && orientation <= 8 ? static_cast<int>(orientation) : 0; }

}  // namespace

int exif_orientation(Bytes bytes) {
    static constexpr std::string_view prefix("Exif\0\0", 6);
    while (bytes.size() >= prefix.size() &&
           std::string_view(reinterpret_cast<const char*>(bytes.data()), prefix.size()) == prefix) {
        bytes = bytes.subspan(prefix.size());
    }
    const Block block(bytes);
    if (!block.is_tiff()) return 0;
    const std::size_t directory = block.number(4, 4);
    const std::uint32_t entries = block.number(directory, 2);
    for (std::uint32_t i = 0; i < entries; ++i) {
        const std::size_t entry = directory + 2 + 12 * static_cast<std::size_t>(i);
        if (entry + 12 > block.size()) return 0;
        if (block.number(entry, 2) != ORIENTATION) continue;
        const std::uint32_t type = block.number(entry + 2, 2);
        const int size = type == SHORT ? 2 : type == LONG ? 4 : type == BYTE ? 1 : 0;
        return size == 0 || block.number(entry + 4, 4) != 1 ? 0 : valid(block.number(entry + 8, size));
    }
    return 0;
}

int xmp_orientation(std::string_view packet) {
    static constexpr std::string_view tag = "tiff:Orientation";
    for (std::size_t at = packet.find(tag); at != std::string_view::npos; at = packet.find(tag, at + 1)) {
        std::string_view rest = packet.substr(at + tag.size());
        const std::size_t skipped = rest.starts_with("=\"") ? 2 : rest.starts_with('>') ? 1 : 0;
        if (skipped != 0 && rest.size() > skipped && std::isdigit(static_cast<unsigned char>(rest[skipped]))) {
            return valid(static_cast<std::uint32_t>(rest[skipped] - '0'));
        }
    }
    return 0;
}

int raw_profile_orientation(std::string_view text) {
    for (int line = 0; line < 3; ++line) {
        const std::size_t end = text.find('\n');
        if (end == std::string_view::npos) return 0;
        text.remove_prefix(end + 1);
    }
    std::string block;
    int digits = 0, value = 0;
    for (const char letter : text) {
        if (std::isspace(static_cast<unsigned char>(letter))) continue;
        if (!std::isxdigit(static_cast<unsigned char>(letter))) return 0;
        const int digit = letter <= '9' ? letter - '0' : (letter | 32) - 'a' + 10;
        value = value * 16 + digit;
        if (++digits % 2 == 0) {
            block += static_cast<char>(value);
            value = 0;
        }
    }
    return exif_orientation(as_bytes(block));
}

Image turn_upright(Image image, int orientation) {
    if (orientation < 2 || orientation > 8) return image;
    const bool transposed = orientation >= 5;
    Image upright(transposed ? image.height : image.width, transposed ? image.width : image.height);
    for (int y = 0; y < upright.height; ++y) {
        std::uint8_t* to = upright.row(y);
        for (int x = 0; x < upright.width; ++x, to += 3) {
            int column = transposed ? y : x, row = transposed ? x : y;
            if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) column = image.width - 1 - column;
            if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) row = image.height - 1 - row;
            const std::uint8_t* const from = image.row(row) + 3 * static_cast<std::size_t>(column);
            to[0] = from[0], to[1] = from[1], to[2] = from[2];
        }
    }
    return upright;
}

}  // namespace vesalius
