#include "vlm/patches.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

constexpr int LARGEST_SIDE = 1 << 10;  // of a patch, a token or a window

int side(const nlohmann::json& entry, const char* name, int least) {
    const auto value = entry.at(name).get<std::int64_t>();
    if (value < least || value > LARGEST_SIDE)
        throw InputError("preprocessing." + std::string(name) + " is " + std::to_string(value));
    return static_cast<int>(value);
}

// Python's round: halves to the even number.
double multiple(double length, int factor) { return std::nearbyint(length / factor) * factor; }

Tensor positions_of(int rows, int columns, int merge) {
    std::vector<std::int64_t> values;
    for (int row = 0; row < rows; row += merge)
        for (int column = 0; column < columns; column += merge)
            for (int y = 0; y < merge; ++y)
                for (int x = 0; x < merge; ++x) values.insert(values.end(), {row + y, column + x});
    return make_tensor(std::move(values), {std::int64_t{rows} * columns / (merge * merge), merge * merge, 2});
}

// Windows left to right and top to bottom, each with its patches in the image's order.
void add_windows(Patches& patches, int side) {
    const std::int64_t across = (patches.columns + side - 1) / side, down = (patches.rows + side - 1) / side;
    const std::int64_t length = std::int64_t{side} * side, count = patches.positions.numel() / 2;
    std::vector<std::int64_t> windows(static_cast<std::size_t>(across * down * length), -1), slots,
        filled(static_cast<std::size_t>(across * down));
    const auto* place = patches.positions.data<std::int64_t>();
    for (std::int64_t patch = 0; patch < count; ++patch, place += 2) {
        const std::int64_t window = place[0] / side * across + place[1] / side;
        const std::int64_t slot = window * length + filled[static_cast<std::size_t>(window)]++;
        windows[static_cast<std::size_t>(slot)] = patch;
        slots.push_back(slot);
    }
    patches.windows = make_tensor(std::move(windows), {across * down, length});
    patches.slots = make_tensor(std::move(slots), {patches.tokens(), patches.values.shape[1]});
}

}  // namespace

PatchSettings PatchSettings::parse(const nlohmann::json& entry) try {
    PatchSettings how;
    if (entry.at("kind") != "qwen") throw InputError("preprocessing.kind is not qwen");
    how.patch = side(entry, "patch_size", 1);
    how.merge = side(entry, "merge_size", 1);
    how.times = side(entry, "temporal_patch_size", 1);
    how.window = side(entry, "window_size", 0);
    how.min_pixels = entry.at("min_pixels").get<std::int64_t>();
    how.max_pixels = entry.at("max_pixels").get<std::int64_t>();
    how.most_aspect = entry.at("most_aspect").get<double>();
    how.scale = entry.at("scale").get<double>();
    how.filter = filter_named(entry.at("filter").get<std::string>());
    how.mean = entry.at("mean").get<std::array<float, 3>>();
    how.std = entry.at("std").get<std::array<float, 3>>();
    if (how.min_pixels < 1 || how.max_pixels < how.min_pixels) throw InputError("preprocessing.max_pixels is less than min_pixels");
    if (!entry.at("antialias").get<bool>()) throw InputError("preprocessing.antialias is false (expected true)");
    if (std::ranges::find(how.std, 0.0F) != how.std.end()) throw InputError("preprocessing.std holds a 0");
    return how;
} catch (const nlohmann::json::exception& error) {
    throw InputError("preprocessing: " + one_line(error.what()));
}

std::array<int, 2> patched_size(int height, int width, const PatchSettings& how) {
    if (std::max(height, width) > how.most_aspect * std::min(height, width)) {
        throw InputError("the longer side is more than " + std::to_string(std::lround(how.most_aspect)) + " times the shorter");
    }
    const int factor = how.patch * how.merge;
    const double area = static_cast<double>(height) * width;
    double high = multiple(height, factor), wide = multiple(width, factor);
    if (high * wide > static_cast<double>(how.max_pixels)) {
        const double shrink = std::sqrt(area / static_cast<double>(how.max_pixels));
        high = std::max<double>(factor, std::floor(height / shrink / factor) * factor);
        wide = std::max<double>(factor, std::floor(width / shrink / factor) * factor);
    } else if (high * wide < static_cast<double>(how.min_pixels)) {
        const double grow = std::sqrt(static_cast<double>(how.min_pixels) / area);
        high = std::ceil(height * grow / factor) * factor;
        wide = std::ceil(width * grow / factor) * factor;
    }
    return {static_cast<int>(high), static_cast<int>(wide)};
}

Patches cut_patches(const Image& image, const PatchSettings& how) {
    const auto [high, wide] = patched_size(image.height, image.width, how);
    const Image resized = resize(image, wide, high, how.filter);
    Patches patches;
    patches.rows = high / how.patch;
    patches.columns = wide / how.patch;
    patches.positions = positions_of(patches.rows, patches.columns, how.merge);
    const std::int64_t p = how.patch, square = std::int64_t{how.merge} * how.merge;
    patches.values = make_tensor(DType::float32, {patches.positions.shape[0], square, 3 * how.times * p * p});

    float normalised[3][256];  // as NumPy does it: scaled in double, the rest in float
    for (std::size_t c = 0; c < 3; ++c)
        for (int level = 0; level < 256; ++level)
            normalised[c][level] = (static_cast<float>(level * how.scale) - how.mean[c]) / how.std[c];

    const auto* place = patches.positions.data<std::int64_t>();
    auto* to = patches.values.data<float>();
    for (std::int64_t patch = 0; patch < patches.positions.numel() / 2; ++patch, place += 2) {
        for (int c = 0; c < 3; ++c) {
            float* const first = to;  // each moment shows the same
            for (std::int64_t y = 0; y < p; ++y) {
                const std::uint8_t* from = resized.row(static_cast<int>(place[0] * p + y)) + 3 * place[1] * p + c;
                for (std::int64_t x = 0; x < p; ++x, from += 3) *to++ = normalised[c][*from];
            }
            for (int time = 1; time < how.times; ++time) to = std::copy_n(first, p * p, to);
        }
    }
    if (how.window > 0) add_windows(patches, how.window);
    return patches;
}

}  // namespace vesalius
