// A byte-level BPE tokenizer, read from Hugging Face's tokenizer.json: text to tokens and back, as `tokenizers` does it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vesalius {

struct AddedToken;

class Tokenizer {
 public:
    // Reads tokenizer.json. Throws InputError that names the file and what in it is damaged or not supported.
    static Tokenizer read(const std::filesystem::path& file);

    // The tokens of UTF-8 text; added tokens in it are read as such. Throws InputError for other bytes.
    std::vector<std::int64_t> encode(const std::string& text) const;

    // The bytes of tokens: a character may be cut where an answer is (`mend`, `unfinished` of unicode.hpp). Tokens that are not in
    // the vocabulary have none, nor have special tokens where they are skipped.
    std::string bytes(const std::vector<std::int64_t>& ids, bool skip_special = true) const;

    // The text of tokens.
    std::string decode(const std::vector<std::int64_t>& ids, bool skip_special = true) const;

    // The first special token's text in `text`, or an empty one.
    std::string special_in(std::string_view text) const;

 private:
    struct Parts;
    explicit Tokenizer(std::shared_ptr<const Parts> parts) : parts_(std::move(parts)) {}
    std::shared_ptr<const Parts> parts_;
};

}  // namespace vesalius
