// A prompt's tokens and where each stands: Qwen's M-RoPE, as transformers' get_rope_index gives it.
#pragma once

#include <cstdint>
#include <vector>

#include "bundle/tensor.hpp"
#include "vlm/patches.hpp"

namespace vesalius {

struct PromptTokens {
    std::vector<std::int64_t> ids;
    Tensor positions;       // [3, 1, T]: time, row and column; of text thrice the same
    std::int64_t next = 0;  // where the answer's first token stands
};

// `ids` with as many image tokens as each image has, in order, where they had one. InputError where images and tokens differ in
// number.
PromptTokens place_tokens(const std::vector<std::int64_t>& ids, std::int64_t image_token, const std::vector<Patches>& images,
                          int merge);

}  // namespace vesalius
