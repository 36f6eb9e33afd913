// Byte-pair encoding: a piece's letters, joined pair by pair in the order in which the vocabulary learnt them.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace vesalius {

class Merges {
 public:
    // `model` of tokenizer.json: vocab, merges (pairs, or "left right"), ignore_merges. Throws InputError for what it cannot do.
    explicit Merges(const nlohmann::json& model);

    // The tokens of one piece, given as letters of the byte alphabet, appended to `ids`. A letter that the vocabulary lacks is
    // left out, as Hugging Face's does without an unknown token.
    void encode(const std::string& letters, std::vector<std::int64_t>& ids) const;

    const std::unordered_map<std::string, std::int64_t>& vocabulary() const { return vocabulary_; }

 private:
    struct Merge {
        std::int64_t rank, id;
    };
    const Merge* merge_of(std::int64_t left, std::int64_t right) const;

    std::unordered_map<std::string, std::int64_t> vocabulary_;
    std::unordered_map<std::uint64_t, Merge> merges_;  // by left << 32 | right
    bool whole_first_ = false;
};

}  // namespace vesalius
