#include "tokenizer/byte_alphabet.hpp"

#include <array>
#include <cstdint>
#include <unordered_map>

#include "tokenizer/unicode.hpp"

namespace vesalius {
namespace {

struct Alphabet {
    std::array<std::string, 256> letters;
    std::unordered_map<std::uint32_t, char> bytes;

    // Printable Latin-1 stands for itself; the others, in order, for U+0100 and on.
    Alphabet() {
        std::uint32_t next = 256;
        for (std::uint32_t byte = 0; byte < 256; ++byte) {
            const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
            const std::uint32_t code = printable ? byte : next++;
            append_character(letters[byte], code);
            bytes[code] = static_cast<char>(byte);
        }
    }
};

const Alphabet& alphabet() {
    static const Alphabet one;
    return one;
}

}  // namespace

const std::string& letter_of(unsigned char byte) { return alphabet().letters[byte]; }

std::string to_letters(std::string_view text) {
    std::string letters;
    letters.reserve(text.size() + text.size() / 4);
    for (const char byte : text) letters += letter_of(static_cast<unsigned char>(byte));
    return letters;
}

std::string from_letters(std::string_view token) {
    std::string bytes;
    for (std::string_view rest = token; !rest.empty();) {
        std::uint32_t code = 0;
        const std::size_t length = read_character(rest, code);
        const auto found = alphabet().bytes.find(code);
        if (length == 0 || found == alphabet().bytes.end()) return std::string(token);
        bytes += found->second;
        rest.remove_prefix(length);
    }
    return bytes;
}

}  // namespace vesalius
