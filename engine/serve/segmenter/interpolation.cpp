#include "segmenter/interpolation.hpp"

#include <algorithm>

namespace vesalius {

std::vector<Interpolation::Pair> Interpolation::pairs(int from, int to) {
    std::vector<Pair> found;
    const float scale = static_cast<float>(from) / static_cast<float>(to);
    for (int i = 0; i < to; ++i) {
        const float place = std::max(0.0F, scale * (static_cast<float>(i) + 0.5F) - 0.5F);
        const int first = std::min(static_cast<int>(place), from - 1);
        const float weight = std::clamp(place - static_cast<float>(first), 0.0F, 1.0F);
        found.push_back({first, std::min(first + 1, from - 1), weight});
    }
    return found;
}

Interpolation::Interpolation(const Plane& plane, int width, int height, int to_width, int to_height)
    : plane_(plane), columns_(pairs(width, to_width)), rows_(pairs(height, to_height)) {}

void Interpolation::row(int y, float* to) const {
    const Pair& rows = rows_[static_cast<std::size_t>(y)];
    const float *const above = plane_.row(rows.first), *const below = plane_.row(rows.second);
    for (const Pair& columns : columns_) {
        const float upper = (1 - columns.weight) * above[columns.first] + columns.weight * above[columns.second];
        const float lower = (1 - columns.weight) * below[columns.first] + columns.weight * below[columns.second];
        *to++ = (1 - rows.weight) * upper + rows.weight * lower;
    }
}

Plane interpolate(const Plane& plane, int width, int height) {
    Plane result{width, height, std::vector<float>(static_cast<std::size_t>(width) * height)};
    const Interpolation rows(plane, plane.width, plane.height, width, height);
    for (int y = 0; y < height; ++y) rows.row(y, result.values.data() + static_cast<std::size_t>(y) * width);
    return result;
}

}  // namespace vesalius
