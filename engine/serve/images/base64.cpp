#include "images/base64.hpp"

#include <array>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

constexpr std::string_view DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

constexpr auto values() {
    std::array<signed char, 256> table{};
    table.fill(-1);
    for (std::size_t i = 0; i < DIGITS.size(); ++i) table[static_cast<unsigned char>(DIGITS[i])] = static_cast<signed char>(i);
    return table;
}

constexpr std::array<signed char, 256> VALUES = values();

}  // namespace

std::string encode_base64(Bytes content) {
    std::string text;
    text.reserve((content.size() + 2) / 3 * 4);
    for (std::size_t i = 0; i < content.size(); i += 3) {
        const std::size_t left = content.size() - i;
        const std::uint32_t bits = content[i] << 16 | (left > 1 ? content[i + 1] << 8 : 0) | (left > 2 ? content[i + 2] : 0);
        text += DIGITS[bits >> 18];
        text += DIGITS[bits >> 12 & 63];
        text += left > 1 ? DIGITS[bits >> 6 & 63] : '=';
        text += left > 2 ? DIGITS[bits & 63] : '=';
    }
    return text;
}

std::string decode_base64(std::string_view text) {
    const auto wrong = [] { return InputError("not base64"); };
    if (text.size() % 4 != 0) throw wrong();
    std::size_t padding = 0;
    while (padding < 2 && text.ends_with('=')) {
        text.remove_suffix(1);
        ++padding;
    }
    std::string content;
    content.reserve(text.size() / 4 * 3 + 2);
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const int value = VALUES[static_cast<unsigned char>(text[i])];
        if (value < 0) throw wrong();
        bits = bits << 6 | static_cast<std::uint32_t>(value);
        if (i % 4 != 0) content += static_cast<char>(bits >> (6 - 2 * (i % 4)) & 255);
    }
    return content;
}

std::string decode_data_uri(std::string_view uri) {
    for (const std::string_view prefix : {"data:image/png;base64,", "data:image/jpeg;base64,", "data:image/jpg;base64,"}) {
        if (uri.starts_with(prefix)) return decode_base64(uri.substr(prefix.size()));
    }
    throw InputError("expected a data URI: data:image/png;base64,... or data:image/jpeg;base64,...");
}

}  // namespace vesalius
