// Masks of images, by a bundle of the SAM family: an image's embedding is computed once, then any number of prompts.
#pragma once

#include <functional>
#include <vector>

#include "bundle/bundle.hpp"
#include "segmenter/frame.hpp"
#include "segmenter/prompt.hpp"

namespace vesalius {

struct Embedding {
    Frame frame;
    Tensor values;  // [1, C, h, w]
};

struct Segmentation {
    Mask mask;      // in the image's own size
    float iou = 0;  // as the model predicts it
};

class Segmenter {
 public:
    // InputError where the bundle lacks what a segmenter needs.
    explicit Segmenter(const Bundle& bundle);

    Embedding embed(const Image& image);
    // Checks the prompts, then gives away a mask for each as it is made, so that there is one at a time. Those of as many points
    // run through the decoder together.
    using Take = std::function<void(std::size_t prompt, Segmentation made)>;
    void segment(const Embedding& embedding, const std::vector<Prompt>& prompts, const Take& take);
    // InputError where a prompt does not lie in the image, or is of a kind that this bundle does not take.
    void check(const Prompt& prompt, int width, int height) const;

 private:
    // The decoder's points of a prompt, in pixels of its square: its own, then its box's corners or one that stands for no box.
    struct Tokens {
        std::vector<float> coords, labels;
    };
    Tokens tokens(const Prompt& prompt, const Frame& frame) const;
    void decode(const Embedding& embedding, const std::vector<Tokens>& tokens, const std::vector<std::size_t>& which,
                const Take& take);

    Preprocessing preprocessing_;
    Module encoder_, decoder_;
    bool takes_box_, takes_points_;
    float outside_, inside_, top_left_, bottom_right_, no_box_;  // labels
    Range prompts_, points_;
};

}  // namespace vesalius
