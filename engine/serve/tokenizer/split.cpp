#include "tokenizer/split.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "bundle/errors.hpp"
#include "tokenizer/late_characters.hpp"

namespace vesalius {

const char* const GPT2_PATTERN = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

// \s is Unicode's White_Space to Oniguruma; to PCRE2 it is that and U+180E.
const std::string SPACES = R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// What stands for \s, \p{L} or \p{N} within a class; empty for anything else. `length`: of the pattern that it stands for.
std::string members(std::string_view pattern, std::size_t& length) {
    if (pattern.starts_with("\\s")) return length = 2, SPACES;
    if (pattern.starts_with("\\p{L}")) return length = 5, std::string("\\p{L}").append(LATE_LETTERS);
    if (pattern.starts_with("\\p{N}")) return length = 5, std::string("\\p{N}").append(LATE_NUMBERS);
    return {};
}

std::string in_pcre(std::string_view pattern) {
    std::string translated;
    bool in_class = false;
    for (std::size_t i = 0, length = 1; i < pattern.size(); i += length) {
        const std::string_view rest = pattern.substr(i);
        length = rest[0] == '\\' ? std::min<std::size_t>(2, rest.size()) : 1;
        if (const std::string set = members(rest, length); !set.empty()) {
            translated += in_class ? set : std::string("[").append(set).append("]");
        } else if (rest.starts_with("\\S") || rest.starts_with("\\P")) {
            if (in_class || rest[1] == 'P') throw InputError("pattern: \\P, and \\S within a class, are not supported");
            translated.append("[^").append(SPACES).append("]");
        } else {
            if (length == 1) in_class = rest[0] == '[' || (in_class && rest[0] != ']');
            translated.append(rest.substr(0, length));
        }
    }
    return translated;
}

}  // namespace

struct Split::Program {
    pcre2_code* code = nullptr;
    Program() = default;
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;
    ~Program() { pcre2_code_free(code); }
};

Split::Split(const std::string& pattern) {
    auto program = std::make_shared<Program>();
    const std::string translated = in_pcre(pattern);
    int error = 0;
    PCRE2_SIZE place = 0;
    const std::uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK;
    program->code =
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), options, &error, &place, nullptr);
    if (program->code == nullptr) {
        PCRE2_UCHAR message[160];
        pcre2_get_error_message(error, message, sizeof message);
        throw InputError("pattern '" + pattern + "': " + reinterpret_cast<const char*>(message));
    }
    pcre2_jit_compile(program->code, PCRE2_JIT_COMPLETE);  // where it cannot, the interpreter matches
    program_ = std::move(program);
}

void Split::cut(std::string_view text, std::vector<std::string_view>& pieces) const {
    const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> found(
        pcre2_match_data_create_from_pattern(program_->code, nullptr), pcre2_match_data_free);
    if (!found) throw std::bad_alloc();
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    std::size_t start = 0;
    while (start < text.size()) {
        const int count =
            pcre2_match(program_->code, subject, text.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, found.get(), nullptr);
        if (count == PCRE2_ERROR_NOMATCH) break;
        if (count < 0) throw InputError("text: too long for the pre-tokenizer's pattern");
        const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(found.get());
        if (ends[0] > start) pieces.push_back(text.substr(start, ends[0] - start));
        pieces.push_back(text.substr(ends[0], ends[1] - ends[0]));
        start = ends[1];
    }
    if (start < text.size()) pieces.push_back(text.substr(start));
}

}  // namespace vesalius
