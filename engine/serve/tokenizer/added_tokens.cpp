#include "tokenizer/added_tokens.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "tokenizer/unicode.hpp"

namespace vesalius {

AddedTokens::AddedTokens(const nlohmann::json& tokens, bool composes) {
    for (const auto& one : tokens) {
        AddedToken token{one.at("content").get<std::string>(), one.at("id").get<std::int64_t>(), one.value("special", false)};
        for (const char* flag : {"single_word", "lstrip", "rstrip"})
            if (one.value(flag, false)) throw InputError("added token '" + token.content + "': " + flag + " is not supported");
        if (token.content.empty()) throw InputError("an added token is empty");
        by_id_.emplace(token.id, token);
        const bool normalized = one.value("normalized", !token.special);
        if (normalized && composes) token.content = compose(token.content);
        Set& set = normalized ? normalized_ : given_;
        set.starts[static_cast<unsigned char>(token.content[0])] = true;
        set.tokens.push_back(std::move(token));
    }
    for (Set* set : {&given_, &normalized_})
        std::stable_sort(set->tokens.begin(), set->tokens.end(),
                         [](const AddedToken& a, const AddedToken& b) { return a.content.size() > b.content.size(); });
}

const AddedToken* AddedTokens::find(std::string_view text, std::size_t start, bool normalized, std::size_t& place) const {
    const Set& set = normalized ? normalized_ : given_;
    for (place = start; place < text.size(); ++place) {
        if (!set.starts[static_cast<unsigned char>(text[place])]) continue;
        for (const AddedToken& token : set.tokens)
            if (text.substr(place).starts_with(token.content)) return &token;
    }
    return nullptr;
}

const AddedToken* AddedTokens::by_id(std::int64_t id) const {
    const auto found = by_id_.find(id);
    return found == by_id_.end() ? nullptr : &found->second;
}

const AddedToken* AddedTokens::special_in(std::string_view text) const {
    for (const Set* set : {&given_, &normalized_}) {
        std::size_t place = 0;
        while (const AddedToken* token = find(text, place, set == &normalized_, place)) {
            if (token->special) return token;
            place += token->content.size();
        }
    }
    return nullptr;
}

}  // namespace vesalius
