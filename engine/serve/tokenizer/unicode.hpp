// UTF-8 as bytes: checked, put into normal form C, and mended.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace vesalius {

// Length in bytes of the character at the start of `text`, or 0 where the bytes are not UTF-8 (also for overlong forms, surrogates
// and what is beyond U+10FFFF). `code` receives the character.
std::size_t read_character(std::string_view text, std::uint32_t& code);

bool is_utf8(std::string_view text);

void append_character(std::string& text, std::uint32_t code);

// Normal form C (UAX 15) of UTF-8 text, as Hugging Face's normaliser gives it.
std::string compose(std::string_view text);

// U+FFFD for each longest prefix of a character that is not continued, as Unicode (chapter 3, "substitution of maximal subparts")
// and Rust's String::from_utf8_lossy have it.
std::string mend(std::string_view bytes);

// How many bytes at the end of `bytes` are the beginning of a character whose rest may still come: 0 to 3.
std::size_t unfinished(std::string_view bytes);

}  // namespace vesalius
