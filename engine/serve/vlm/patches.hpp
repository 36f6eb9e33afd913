// An image as Qwen's vision tower reads it, equal to transformers' image processor and models/qwen/export/image_layout.py.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>

#include "bundle/tensor.hpp"
#include "images/image.hpp"
#include "images/resize.hpp"

namespace vesalius {

// The manifest's `preprocessing` of kind qwen.
struct PatchSettings {
    int patch = 14, merge = 2, times = 2;  // sides of a patch in pixels, of a token in patches, of a patch in moments
    int window = 0;                        // side of a window in patches; 0: none
    std::int64_t min_pixels = 0, max_pixels = 0;
    double most_aspect = 200, scale = 0;
    Filter filter = Filter::bicubic;
    std::array<float, 3> mean{}, std{};

    // InputError that names the entry which is missing or cannot be done.
    static PatchSettings parse(const nlohmann::json& entry);
};

// The height and width that an image is resized to: multiples of patch * merge, its area within the limits, its shape nearly kept.
// InputError for a side that is more than `most_aspect` others.
std::array<int, 2> patched_size(int height, int width, const PatchSettings& how);

struct Patches {
    int rows = 0, columns = 0;  // patches
    // values [n, m*m, 3*t*p*p], positions [n, m*m, 2]; where there are windows, those [W, L] and slots [n, m*m]
    Tensor values, positions, windows, slots;

    std::int64_t tokens() const { return values.shape.at(0); }
};

Patches cut_patches(const Image& image, const PatchSettings& how);

}  // namespace vesalius
