#include "tokenizer/unicode.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>
#include <utility>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

struct Lead {
    std::size_t length;             // of the character; 0: no character starts so
    unsigned char lowest, highest;  // that the second byte may be
};

// Table 3-7 of the Unicode standard: well-formed UTF-8.
Lead lead_of(unsigned char byte) {
    if (byte < 0x80) return {1, 0, 0};
    if (byte < 0xC2) return {0, 0, 0};
    if (byte < 0xE0) return {2, 0x80, 0xBF};
    if (byte == 0xE0) return {3, 0xA0, 0xBF};
    if (byte == 0xED) return {3, 0x80, 0x9F};
    if (byte < 0xF0) return {3, 0x80, 0xBF};
    if (byte == 0xF0) return {4, 0x90, 0xBF};
    if (byte < 0xF4) return {4, 0x80, 0xBF};
    if (byte == 0xF4) return {4, 0x80, 0x8F};
    return {0, 0, 0};
}

// Bytes at the start of `text` that are a character or the beginning of one; `whole` says which.
std::size_t valid_prefix(std::string_view text, bool& whole) {
    const Lead lead = lead_of(static_cast<unsigned char>(text[0]));
    whole = lead.length == 1;
    if (lead.length < 2) return lead.length;
    std::size_t length = 1;
    while (length < lead.length && length < text.size()) {
        const auto byte = static_cast<unsigned char>(text[length]);
        const bool fits = length == 1 ? byte >= lead.lowest && byte <= lead.highest : (byte & 0xC0) == 0x80;
        if (!fits) return length;
        ++length;
    }
    whole = length == lead.length;
    return length;
}

// What neither moves nor joins in Hugging Face's normaliser, which knows Unicode 9: marks that came later, and later letters that
// join with others. And U+11A7, which stands before the first Hangul final and is none: utf8proc 2.8 takes it for one and drops it.
constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 46> INERT{{
    {0x7fd, 0x7fd},     {0x897, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},     {0xd3b, 0xd3c},
    {0xeba, 0xeba},     {0x11a7, 0x11a7},   {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},
    {0x105c0, 0x105f3}, {0x10d24, 0x10d27}, {0x10d69, 0x10d6d}, {0x10eab, 0x10eac}, {0x10efc, 0x10eff}, {0x10f46, 0x10f50},
    {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x11380, 0x113d0}, {0x113e1, 0x113e2}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x11930, 0x11930}, {0x11935, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97},
    {0x11f41, 0x11f42}, {0x16100, 0x1612f}, {0x16d40, 0x16d6c}, {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136},
    {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}, {0x1e5ee, 0x1e5ef},
}};

bool is_inert(std::uint32_t code) {
    return std::any_of(INERT.begin(), INERT.end(), [&](auto range) { return code >= range.first && code <= range.second; });
}

std::string compose_known(std::string_view text) {
    utf8proc_uint8_t* composed = nullptr;
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const auto length = utf8proc_map(bytes, static_cast<utf8proc_ssize_t>(text.size()), &composed, options);
    if (length == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
    if (length < 0) throw InputError(std::string("text: ") + utf8proc_errmsg(length));
    std::string result(reinterpret_cast<const char*>(composed), static_cast<std::size_t>(length));
    std::free(composed);
    return result;
}

}  // namespace

std::size_t read_character(std::string_view text, std::uint32_t& code) {
    if (text.empty()) return 0;
    bool whole = false;
    const std::size_t length = valid_prefix(text, whole);
    if (!whole) return 0;
    const auto first = static_cast<unsigned char>(text[0]);
    code = length == 1 ? first : first & (0x7Fu >> length);
    for (std::size_t i = 1; i < length; ++i) code = code << 6 | (static_cast<unsigned char>(text[i]) & 0x3Fu);
    return length;
}

bool is_utf8(std::string_view text) {
    std::uint32_t code = 0;
    while (!text.empty()) {
        const std::size_t length = read_character(text, code);
        if (length == 0) return false;
        text.remove_prefix(length);
    }
    return true;
}

void append_character(std::string& text, std::uint32_t code) {
    utf8proc_uint8_t bytes[4];
    const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code), bytes);
    text.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(length));
}

std::string compose(std::string_view text) {
    std::string composed;
    std::size_t start = 0, length = 0;
    for (std::size_t place = 0; place < text.size(); place += length) {
        std::uint32_t code = 0;
        length = std::max<std::size_t>(1, read_character(text.substr(place), code));
        if (!is_inert(code)) continue;
        composed.append(compose_known(text.substr(start, place - start))).append(text.substr(place, length));
        start = place + length;
    }
    return composed.append(compose_known(text.substr(start)));
}

std::string mend(std::string_view bytes) {
    std::string text;
    while (!bytes.empty()) {
        bool whole = false;
        const std::size_t length = valid_prefix(bytes, whole);
        text += whole ? bytes.substr(0, length) : std::string_view("\xEF\xBF\xBD");
        bytes.remove_prefix(length == 0 ? 1 : length);
    }
    return text;
}

std::size_t unfinished(std::string_view bytes) {
    for (std::size_t length = 1; length <= 3 && length <= bytes.size(); ++length) {
        const std::string_view end = bytes.substr(bytes.size() - length);
        if (lead_of(static_cast<unsigned char>(end[0])).length <= length) continue;
        bool whole = false;
        return valid_prefix(end, whole) == length ? length : 0;
    }
    return 0;
}

}  // namespace vesalius
