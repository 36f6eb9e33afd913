// Text cut by a regular expression: its matches and what lies between them, in order, each a piece.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vesalius {

// The pattern that a byte-level pre-tokenizer cuts by where it is asked to: GPT-2's.
extern const char* const GPT2_PATTERN;

class Split {
 public:
    // `pattern` as Oniguruma reads it (Hugging Face's engine); what Qwen's and GPT-2's patterns use of it means the same here.
    // Throws InputError for one that PCRE2 cannot read.
    explicit Split(const std::string& pattern);

    // The pieces of UTF-8 `text`, which they are views of, appended to `pieces`.
    void cut(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
    struct Program;
    std::shared_ptr<const Program> program_;
};

}  // namespace vesalius
