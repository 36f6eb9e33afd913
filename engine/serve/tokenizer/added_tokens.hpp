// Tokens that are found in a text before anything else is done to it: special ones, and those added to a vocabulary.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace vesalius {

struct AddedToken {
    std::string content;
    std::int64_t id;
    bool special;
};

class AddedTokens {
 public:
    // `added_tokens` of tokenizer.json. Throws InputError for one that takes spaces or words around it into account.
    AddedTokens(const nlohmann::json& tokens, bool composes);

    // The token that starts first in `text` at or after `start`, the longest of those; nullptr where there is none.
    // `normalized`: look for those that are to be found in normalised text, else for those in the text as it was given.
    const AddedToken* find(std::string_view text, std::size_t start, bool normalized, std::size_t& place) const;

    const AddedToken* by_id(std::int64_t id) const;

    // The first special token within `text`, or nullptr.
    const AddedToken* special_in(std::string_view text) const;

 private:
    struct Set {
        std::vector<AddedToken> tokens;  // the longest first
        bool starts[256] = {};           // whether one begins with this byte
    };
    Set given_, normalized_;
    std::unordered_map<std::int64_t, AddedToken> by_id_;
};

}  // namespace vesalius
