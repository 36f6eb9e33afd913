#include "tokenizer/merges.hpp"

#include <nlohmann/json.hpp>
#include <queue>
#include <tuple>

#include "bundle/errors.hpp"
#include "tokenizer/unicode.hpp"

namespace vesalius {
namespace {

using nlohmann::json;

constexpr std::int64_t MOST_TOKENS = std::int64_t{1} << 31;

std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

void refuse_what_is_not_done(const json& model) {
    const std::string type = model.value("type", "BPE");
    if (type != "BPE") throw InputError("model is " + type + " (expected BPE)");
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix", "unk_token", "dropout"}) {
        const auto found = model.find(name);
        const bool unset = found == model.end() || found->is_null() || *found == "" || *found == 0;
        if (!unset) throw InputError(std::string("model.") + name + " is not supported");
    }
    if (model.value("byte_fallback", false)) throw InputError("model.byte_fallback is not supported");
}

std::pair<std::string, std::string> halves(const json& merge) {
    if (merge.is_array() && merge.size() == 2) return {merge[0].get<std::string>(), merge[1].get<std::string>()};
    const auto text = merge.get<std::string>();
    const std::size_t space = text.find(' ');
    if (space == std::string::npos) throw InputError("merge '" + text + "' has no two halves");
    return {text.substr(0, space), text.substr(space + 1)};
}

}  // namespace

Merges::Merges(const json& model) {
    refuse_what_is_not_done(model);
    whole_first_ = model.value("ignore_merges", false);
    for (const auto& [token, id] : model.at("vocab").items()) {
        const auto number = id.get<std::int64_t>();
        if (number < 0 || number >= MOST_TOKENS) throw InputError("token '" + token + "' has the id " + std::to_string(number));
        vocabulary_.emplace(token, number);
    }
    std::int64_t rank = 0;
    for (const json& merge : model.at("merges")) {
        const auto [left, right] = halves(merge);
        const auto first = vocabulary_.find(left), second = vocabulary_.find(right), both = vocabulary_.find(left + right);
        if (first == vocabulary_.end() || second == vocabulary_.end() || both == vocabulary_.end())
            throw InputError("merge '" + left + " " + right + "' is of tokens that the vocabulary lacks");
        merges_[pair_key(first->second, second->second)] = {rank++, both->second};
    }
}

const Merges::Merge* Merges::merge_of(std::int64_t left, std::int64_t right) const {
    const auto found = merges_.find(pair_key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
}

void Merges::encode(const std::string& letters, std::vector<std::int64_t>& ids) const {
    if (whole_first_) {
        if (const auto found = vocabulary_.find(letters); found != vocabulary_.end()) {
            ids.push_back(found->second);
            return;
        }
    }
    // A list of symbols, linked so that joining two is a step, and a heap of the pairs that may be joined: the lowest rank first,
    // of these the leftmost. A pair whose symbols have changed since is passed over.
    struct Symbol {
        std::int64_t id, before, after;
    };
    std::vector<Symbol> symbols;
    std::uint32_t code = 0;
    for (std::size_t start = 0; start < letters.size();) {
        const std::size_t length = read_character(std::string_view(letters).substr(start), code);
        const auto found = vocabulary_.find(letters.substr(start, length));
        const auto place = static_cast<std::int64_t>(symbols.size());
        if (found != vocabulary_.end()) symbols.push_back({found->second, place - 1, place + 1});
        start += length;
    }
    const auto end = static_cast<std::int64_t>(symbols.size());
    if (end == 0) return;
    symbols.back().after = -1;

    using Candidate = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;  // rank, place, left, right
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
    const auto consider = [&](std::int64_t place) {
        if (place < 0 || symbols[place].after < 0) return;
        const std::int64_t left = symbols[place].id, right = symbols[symbols[place].after].id;
        if (const Merge* merge = merge_of(left, right)) candidates.emplace(merge->rank, place, left, right);
    };
    for (std::int64_t place = 0; place < end; ++place) consider(place);
    while (!candidates.empty()) {
        const auto [rank, place, left, right] = candidates.top();
        candidates.pop();
        Symbol& first = symbols[place];
        if (first.id != left || first.after < 0 || symbols[first.after].id != right) continue;
        Symbol& second = symbols[first.after];
        first.id = merge_of(left, right)->id;
        first.after = second.after;
        if (second.after >= 0) symbols[second.after].before = place;
        second.id = -1;  // no pair matches it any more
        consider(first.before);
        consider(place);
    }
    for (std::int64_t place = 0; place >= 0; place = symbols[place].after) ids.push_back(symbols[place].id);
}

}  // namespace vesalius
