// GPT-2's byte alphabet: each byte as one printable character, so that a vocabulary of texts can hold any bytes.
#pragma once

#include <string>
#include <string_view>

namespace vesalius {

// The character (UTF-8) that stands for a byte.
const std::string& letter_of(unsigned char byte);

// Each byte of `text` as its letter.
std::string to_letters(std::string_view text);

// The bytes that a token's letters stand for; a token with any other character is its own bytes.
std::string from_letters(std::string_view token);

}  // namespace vesalius
