#include "segmenter/prompt.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

// Numbers between commas; none where one of them is no number.
std::vector<float> numbers(std::string_view text) {
    std::vector<float> found;
    while (true) {
        while (text.starts_with(' ')) text.remove_prefix(1);
        float value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error != std::errc() || !std::isfinite(value)) return {};
        found.push_back(value);
        text.remove_prefix(static_cast<std::size_t>(end - text.data()));
        while (text.starts_with(' ')) text.remove_prefix(1);
        if (text.empty()) return found;
        if (!text.starts_with(',')) return {};
        text.remove_prefix(1);
    }
}

std::string shown(float value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
    return text;
}

}  // namespace

void check_prompt(const Prompt& prompt, int width, int height) {
    const std::string size = std::to_string(width) + " x " + std::to_string(height);
    if (!prompt.box && prompt.points.empty()) throw InputError("neither a box nor points");
    if (prompt.box) {
        const auto [x1, y1, x2, y2] = *prompt.box;
        if (!(0 <= x1 && x1 < x2 && x2 <= static_cast<float>(width) && 0 <= y1 && y1 < y2 && y2 <= static_cast<float>(height))) {
            throw InputError("box " + shown(x1) + "," + shown(y1) + "," + shown(x2) + "," + shown(y2) +
                             " (expected 0 <= x1 < x2 <= " + std::to_string(width) +
                             " and 0 <= y1 < y2 <= " + std::to_string(height) + " in an image of " + size + ")");
        }
    }
    for (const auto& [x, y, label] : prompt.points) {
        if (!(0 <= x && x <= static_cast<float>(width) && 0 <= y && y <= static_cast<float>(height))) {
            throw InputError("point " + shown(x) + "," + shown(y) + " lies outside the image of " + size);
        }
        if (label != 0 && label != 1) {
            throw InputError("point " + shown(x) + "," + shown(y) + " has label " + std::to_string(label) +
                             " (expected 1 inside or 0 outside)");
        }
    }
}

std::array<float, 4> parse_box(const std::string& text) {
    const std::vector<float> sides = numbers(text);
    if (sides.size() != 4) throw InputError("--box " + one_line(text, 60) + ": expected four numbers x1,y1,x2,y2");
    return {sides[0], sides[1], sides[2], sides[3]};
}

std::vector<Point> parse_points(const std::string& text) {
    std::vector<Point> points;
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(';', start), text.size());
        const std::vector<float> values = numbers(std::string_view(text).substr(start, end - start));
        if (values.size() != 3 || (values[2] != 0 && values[2] != 1)) {
            throw InputError("--points " + one_line(text, 60) +
                             ": expected x,y,label;x,y,label with labels 1 (inside) or 0 (outside)");
        }
        points.push_back({values[0], values[1], static_cast<int>(values[2])});
        start = end + 1;
    }
    return points;
}

}  // namespace vesalius
