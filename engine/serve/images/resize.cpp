#include "images/resize.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

constexpr int PRECISION = 32 - 8 - 2;  // bits of a weight's fraction: sums of weighted bytes stay within 32

double triangle(double x) { return std::max(0.0, 1 - std::abs(x)); }

double cubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

struct Window {
    int first = 0;
    std::vector<std::int32_t> weights;
};

// One window of the input for each place of the output. Where the image shrinks, the filter widens by as much.
std::vector<Window> windows(int from, int to, double (*filter)(double), double reach) {
    const double scale = static_cast<double>(from) / to, widening = std::max(scale, 1.0), support = reach * widening;
    std::vector<Window> found(static_cast<std::size_t>(to));
    for (int out = 0; out < to; ++out) {
        const double centre = (out + 0.5) * scale;
        const int first = std::max(0, static_cast<int>(centre - support + 0.5));
        const int end = std::min(from, static_cast<int>(centre + support + 0.5));
        std::vector<double> weights;
        double sum = 0;
        for (int x = first; x < end; ++x) {
            weights.push_back(filter((x - centre + 0.5) * (1 / widening)));
            sum += weights.back();
        }
        Window& window = found[static_cast<std::size_t>(out)];
        window.first = first;
        for (const double weight : weights) {
            const double scaled = (sum != 0 ? weight / sum : weight) * (1 << PRECISION);
            window.weights.push_back(static_cast<std::int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
        }
    }
    return found;
}

std::uint8_t rounded(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> PRECISION, 0, 255)); }

constexpr std::int32_t HALF = 1 << (PRECISION - 1);

Image along_rows(const Image& image, int width, const std::vector<Window>& windows) {
    Image resized(width, image.height);
    for (int y = 0; y < image.height; ++y) {
        std::uint8_t* to = resized.row(y);
        for (const Window& window : windows) {
            std::int32_t sums[3] = {HALF, HALF, HALF};
            const std::uint8_t* from = image.row(y) + 3 * static_cast<std::size_t>(window.first);
            for (const std::int32_t weight : window.weights) {
                for (int c = 0; c < 3; ++c) sums[c] += from[c] * weight;
                from += 3;
            }
            for (const std::int32_t sum : sums) *to++ = rounded(sum);
        }
    }
    return resized;
}

Image along_columns(const Image& image, int height, const std::vector<Window>& windows) {
    Image resized(image.width, height);
    const std::size_t stride = 3 * static_cast<std::size_t>(image.width);
    std::vector<std::int32_t> sums(stride);
    for (int y = 0; y < height; ++y) {
        const Window& window = windows[static_cast<std::size_t>(y)];
        std::ranges::fill(sums, HALF);
        for (std::size_t i = 0; i < window.weights.size(); ++i) {
            const std::uint8_t* const from = image.row(window.first + static_cast<int>(i));
            const std::int32_t weight = window.weights[i];
            for (std::size_t x = 0; x < stride; ++x) sums[x] += from[x] * weight;
        }
        std::ranges::transform(sums, resized.row(y), rounded);
    }
    return resized;
}

// The pixel that each place falls into; the place is summed up step by step, as PIL does, since it rounds on the way.
std::vector<int> picks(int from, int to) {
    std::vector<int> found;
    const double step = static_cast<double>(from) / to;
    double place = step * 0.5;
    for (int i = 0; i < to; ++i, place += step) found.push_back(std::min(static_cast<int>(place), from - 1));
    return found;
}

Image pick(const Image& image, int width, int height) {
    Image resized(width, height);
    const std::vector<int> columns = picks(image.width, width), rows = picks(image.height, height);
    for (int y = 0; y < height; ++y) {
        std::uint8_t* to = resized.row(y);
        for (const int column : columns) {
            const std::uint8_t* const from = image.row(rows[static_cast<std::size_t>(y)]) + 3 * static_cast<std::size_t>(column);
            to = std::copy_n(from, 3, to);
        }
    }
    return resized;
}

}  // namespace

Filter filter_named(std::string_view name) {
    if (name == "nearest") return Filter::nearest;
    if (name == "bilinear") return Filter::bilinear;
    if (name == "bicubic") return Filter::bicubic;
    throw InputError("no filter is called '" + one_line(name, 40) + "' (expected nearest, bilinear or bicubic)");
}

Image resize(const Image& image, int width, int height, Filter filter) {
    if (width == image.width && height == image.height) return image;
    if (filter == Filter::nearest) return pick(image, width, height);
    const auto of = [&](int from, int to) {
        return filter == Filter::bicubic ? windows(from, to, cubic, 2) : windows(from, to, triangle, 1);
    };
    const auto across = [&](const Image& from) {
        return width == from.width ? from : along_rows(from, width, of(from.width, width));
    };
    const auto down = [&](const Image& from) {
        return height == from.height ? from : along_columns(from, height, of(from.height, height));
    };
    // Rows first, but where the width grows and the height shrinks, as Pillow 13 has it. The order shows, since each pass rounds.
    return width > image.width && height < image.height ? across(down(image)) : down(across(image));
}

}  // namespace vesalius
