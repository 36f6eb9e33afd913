#include "segmenter/frame.hpp"

#include <algorithm>
#include <string>

#include "bundle/errors.hpp"
#include "segmenter/interpolation.hpp"

namespace vesalius {
namespace {

constexpr int LARGEST_SQUARE = 1 << 14;

// One of two words.
bool is(const nlohmann::json& entry, const char* key, const std::string& word, const std::string& other) {
    const auto found = entry.at(key).get<std::string>();
    if (found != word && found != other) {
        throw InputError("preprocessing." + std::string(key) + " is '" + one_line(found, 40) + "' (expected " + word + " or " +
                         other + ")");
    }
    return found == word;
}

int scaled(int side, int size, int longest) {
    return std::max(1, static_cast<int>(static_cast<double>(side) * size / longest + 0.5));
}

}  // namespace

Preprocessing Preprocessing::parse(const nlohmann::json& entry) try {
    Preprocessing how;
    is(entry, "kind", "sam", "sam");
    how.size = entry.at("size").get<int>();
    how.longest_side = is(entry, "resize", "longest_side", "square");
    how.filter = filter_named(entry.at("filter").get<std::string>());
    how.min_max = is(entry, "value_range", "minmax", "0-255");
    how.mean = entry.at("mean").get<std::array<float, 3>>();
    how.std = entry.at("std").get<std::array<float, 3>>();
    is(entry, "pad", "bottom_right", "none");
    how.pad_value = entry.at("pad_value").get<float>();
    how.mask_threshold = entry.at("mask_threshold").get<float>();
    if (how.size < 1 || how.size > LARGEST_SQUARE) throw InputError("preprocessing.size is " + std::to_string(how.size));
    if (how.filter != Filter::nearest && !entry.at("antialias").get<bool>()) {
        throw InputError("preprocessing.antialias is false (expected true: filters here widen as an image shrinks)");
    }
    if (std::ranges::find(how.std, 0.0F) != how.std.end()) throw InputError("preprocessing.std holds a 0");
    return how;
} catch (const nlohmann::json::exception& error) {
    throw InputError("preprocessing: " + one_line(error.what()));
}

Frame::Frame(int width, int height, const Preprocessing& how)
    : how_(how),
      width_(width),
      height_(height),
      wide_(how.longest_side ? scaled(width, how.size, std::max(width, height)) : how.size),
      high_(how.longest_side ? scaled(height, how.size, std::max(width, height)) : how.size),
      scale_x_(static_cast<float>(static_cast<double>(wide_) / width)),
      scale_y_(static_cast<float>(static_cast<double>(high_) / height)) {}

Tensor Frame::input(const Image& image) const {
    const Image resized = resize(image, wide_, high_, how_.filter);
    const auto [low, high] = std::ranges::minmax(resized.values);
    const float offset = how_.min_max ? low : 0.0F,
                range = how_.min_max ? std::max<float>(static_cast<float>(high - low), 1e-8F) : 1.0F;
    Tensor tensor = make_tensor(DType::float32, {1, 3, how_.size, how_.size});
    std::fill_n(tensor.data<float>(), tensor.numel(), how_.pad_value);
    for (std::size_t c = 0; c < 3; ++c) {
        float* const channel = tensor.data<float>() + c * static_cast<std::size_t>(how_.size) * how_.size;
        for (int y = 0; y < high_; ++y) {
            const std::uint8_t* from = resized.row(y) + c;
            float* const to = channel + static_cast<std::size_t>(y) * how_.size;
            for (int x = 0; x < wide_; ++x, from += 3) to[x] = ((*from - offset) / range - how_.mean[c]) / how_.std[c];
        }
    }
    return tensor;
}

Mask Frame::mask(const float* logits, int side) const {
    Plane square{side, side, std::vector<float>(logits, logits + static_cast<std::size_t>(side) * side)};
    if (side != how_.size) square = interpolate(square, how_.size, how_.size);
    const Interpolation rows(square, wide_, high_, width_, height_);
    Mask mask(width_, height_);
    std::vector<float> row(static_cast<std::size_t>(width_));
    for (int y = 0; y < height_; ++y) {
        rows.row(y, row.data());
        std::ranges::transform(row, mask.row(y), [&](float logit) { return logit > how_.mask_threshold ? 255 : 0; });
    }
    return mask;
}

}  // namespace vesalius
