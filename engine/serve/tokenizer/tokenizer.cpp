#include "tokenizer/tokenizer.hpp"

#include <cctype>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/byte_alphabet.hpp"
#include "tokenizer/merges.hpp"
#include "tokenizer/split.hpp"
#include "tokenizer/unicode.hpp"

namespace vesalius {
namespace {

using nlohmann::json;

// What is done to a text, in this order, before its pieces become letters.
struct Steps {
    std::vector<Split> splits;
    bool prefix_space = false;
    bool byte_level = false;
};

bool reads_composed(const json& normalizer) {
    if (normalizer.is_null()) return false;
    const auto type = normalizer.at("type").get<std::string>();
    if (type != "NFC") throw InputError("normalizer is " + type + " (expected NFC or none)");
    return true;
}

std::string escaped(const std::string& text) {
    std::string pattern;
    for (const char one : text) {
        if (std::ispunct(static_cast<unsigned char>(one))) pattern += '\\';
        pattern += one;
    }
    return pattern;
}

void add_step(const json& step, Steps& steps) {
    const auto type = step.at("type").get<std::string>();
    if (type == "Sequence") {
        for (const json& one : step.at("pretokenizers")) add_step(one, steps);
        return;
    }
    if (steps.byte_level) throw InputError("pre_tokenizer: " + type + " after ByteLevel is not supported");
    if (type == "Split") {
        if (step.at("behavior") != "Isolated" || step.value("invert", false))
            throw InputError("pre_tokenizer: Split is supported with Isolated matches only");
        const json& pattern = step.at("pattern");
        const bool regex = pattern.contains("Regex");
        steps.splits.emplace_back(regex ? pattern["Regex"].get<std::string>() : escaped(pattern.at("String").get<std::string>()));
    } else if (type == "ByteLevel") {
        steps.byte_level = true;
        steps.prefix_space = step.value("add_prefix_space", true);
        if (steps.prefix_space && !steps.splits.empty())
            throw InputError("pre_tokenizer: add_prefix_space after a Split is not supported");
        if (step.value("use_regex", true)) steps.splits.emplace_back(GPT2_PATTERN);
    } else {
        throw InputError("pre_tokenizer " + type + " is not supported (expected Split and ByteLevel)");
    }
}

Steps read_steps(const json& pre_tokenizer) {
    Steps steps;
    if (!pre_tokenizer.is_null()) add_step(pre_tokenizer, steps);
    if (!steps.byte_level) throw InputError("pre_tokenizer: no ByteLevel");
    return steps;
}

void check_decoder(const json& decoder) {
    if (decoder.is_null() || decoder.at("type") != "ByteLevel") throw InputError("decoder: expected ByteLevel");
}

}  // namespace

struct Tokenizer::Parts {
    bool composes;
    Steps steps;
    Merges merges;
    AddedTokens added;
    std::unordered_map<std::int64_t, std::string> tokens;

    explicit Parts(const json& file)
        : composes(reads_composed(file.value("normalizer", json()))),
          steps(read_steps(file.value("pre_tokenizer", json()))),
          merges(file.at("model")),
          added(file.value("added_tokens", json::array()), composes) {
        check_decoder(file.value("decoder", json()));
        for (const auto& [token, id] : merges.vocabulary()) tokens[id] = token;
    }

    void encode_plain(std::string_view text, std::vector<std::int64_t>& ids) const {
        if (text.empty()) return;
        std::string spaced;
        if (steps.prefix_space && text[0] != ' ') text = spaced = std::string(1, ' ').append(text);
        std::vector<std::string_view> pieces{text}, cut;
        for (const Split& split : steps.splits) {
            cut.clear();
            for (const std::string_view piece : pieces) split.cut(piece, cut);
            pieces.swap(cut);
        }
        for (const std::string_view piece : pieces) merges.encode(to_letters(piece), ids);
    }

    // Added tokens are looked for first in the text as it is, then, between those, in the normalised text.
    void encode(std::string_view text, bool normalized, std::vector<std::int64_t>& ids) const {
        std::size_t start = 0, place = 0;
        const auto between = [&](std::string_view part) {
            if (normalized) return encode_plain(part, ids);
            encode(composes ? compose(part) : std::string(part), true, ids);
        };
        while (const AddedToken* token = added.find(text, start, normalized, place)) {
            between(text.substr(start, place - start));
            ids.push_back(token->id);
            start = place + token->content.size();
        }
        between(text.substr(start));
    }
};

Tokenizer Tokenizer::read(const std::filesystem::path& file) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw InputError(file.string() + ": cannot be read");
    try {
        return Tokenizer(std::make_shared<const Parts>(json::parse(stream)));
    } catch (const InputError& error) {
        throw InputError(file.string() + ": " + error.what());
    } catch (const json::exception& error) {
        throw InputError(file.string() + ": not a tokenizer: " + error.what());
    }
}

std::vector<std::int64_t> Tokenizer::encode(const std::string& text) const {
    if (!is_utf8(text)) throw InputError("text: not UTF-8");
    std::vector<std::int64_t> ids;
    parts_->encode(text, false, ids);
    return ids;
}

std::string Tokenizer::bytes(const std::vector<std::int64_t>& ids, bool skip_special) const {
    std::string bytes;
    for (const std::int64_t id : ids) {
        const AddedToken* token = parts_->added.by_id(id);
        if (token != nullptr) {
            if (!(skip_special && token->special)) bytes += from_letters(token->content);
        } else if (const auto found = parts_->tokens.find(id); found != parts_->tokens.end()) {
            bytes += from_letters(found->second);
        }
    }
    return bytes;
}

std::string Tokenizer::decode(const std::vector<std::int64_t>& ids, bool skip_special) const {
    return mend(bytes(ids, skip_special));
}

std::string Tokenizer::special_in(std::string_view text) const {
    const AddedToken* token = parts_->added.special_in(text);
    return token == nullptr ? std::string() : token->content;
}

}  // namespace vesalius
