// How an image of any size lies in a segmenter's square input, and the way back: models/sam/frame.py and normalise, as the
// manifest's "preprocessing" describes them.
#pragma once

#include <array>
#include <nlohmann/json.hpp>

#include "bundle/tensor.hpp"
#include "images/image.hpp"
#include "images/resize.hpp"

namespace vesalius {

struct Preprocessing {
    int size = 0;              // of the square's side
    bool longest_side = true;  // else both sides are stretched
    Filter filter = Filter::bilinear;
    bool min_max = false;  // the image's own minimum and maximum become 0 and 1
    std::array<float, 3> mean{}, std{};
    float pad_value = 0;  // right of the image and below it, after normalising
    float mask_threshold = 0;

    // InputError where it asks for what is not here.
    static Preprocessing parse(const nlohmann::json& entry);
};

class Frame {
 public:
    Frame(int width, int height, const Preprocessing& preprocessing);

    int width() const { return width_; }
    int height() const { return height_; }

    // [1, 3, S, S] float32.
    Tensor input(const Image& image) const;
    // Pixels of the image -> of the square.
    float x(float image_x) const { return image_x * scale_x_; }
    float y(float image_y) const { return image_y * scale_y_; }
    // [L, L] logits over the square -> the mask in the image's own size.
    Mask mask(const float* logits, int side) const;

 private:
    Preprocessing how_;
    int width_, height_, wide_, high_;  // of the image; of what it fills of the square
    float scale_x_, scale_y_;
};

}  // namespace vesalius
