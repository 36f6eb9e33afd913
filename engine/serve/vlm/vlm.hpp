// Answers about images, by a bundle of kind vlm: one vision pass an image, one prefill, then a token a step on caches that stay.
#pragma once

#include <string>
#include <vector>

#include "bundle/bundle.hpp"
#include "images/image.hpp"
#include "tokenizer/tokenizer.hpp"
#include "vlm/chat.hpp"
#include "vlm/patches.hpp"
#include "vlm/pieces.hpp"
#include "vlm/prompt_tokens.hpp"
#include "vlm/sampler.hpp"

namespace vesalius {

struct PreparedPrompt {
    std::vector<Patches> images;
    PromptTokens tokens;
};

struct Answer {
    std::vector<std::int64_t> tokens;  // without the one that ended it
    std::string text;
    std::size_t prompt_tokens = 0;
    bool ended = false;  // by the model, or by one of the texts that were to end it; else it has as many tokens as were asked for
};

class Vlm {
 public:
    // InputError where the bundle lacks what a VLM needs.
    explicit Vlm(const Bundle& bundle);

    // Everything that can be wrong with a question, before the model is run. The images are those of the messages' parts, in order.
    // InputError where they differ in number, where a text has one of the tokenizer's special tokens, and where prompt and answer
    // have no room together.
    PreparedPrompt prepare(const std::vector<ChatMessage>& messages, const std::vector<Image>& images,
                           std::int64_t max_new_tokens) const;

    // The text ends before the first of `stops` (see Pieces).
    Answer answer(const PreparedPrompt& prompt, std::int64_t max_new_tokens, const Sampling& sampling,
                  const std::vector<std::string>& stops = {}, const OnPiece& on_piece = nullptr);

 private:
    Tensor features(const std::vector<Patches>& images);
    std::vector<Tensor> with_caches(std::vector<Tensor> inputs) const;

    PatchSettings patches_;
    Chat chat_;
    Tokenizer tokenizer_;
    Module vision_, prefill_, decode_;
    std::vector<Tensor> caches_;  // written anew by each prompt: places beyond its length are not read
    std::vector<std::int64_t> ends_;
    std::int64_t image_token_, room_, hidden_;
    double penalty_;
};

}  // namespace vesalius
