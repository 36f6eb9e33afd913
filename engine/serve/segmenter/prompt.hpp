// What is to be segmented: a box, points, or both, in pixels of the image.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace vesalius {

struct Point {
    float x = 0, y = 0;
    int label = 1;  // 1 inside what is meant, 0 outside
};

struct Prompt {
    std::optional<std::array<float, 4>> box;  // x1, y1, x2, y2
    std::vector<Point> points;
};

// InputError where there is neither, or where it does not lie in an image of this size.
void check_prompt(const Prompt& prompt, int width, int height);

// "x1,y1,x2,y2"
std::array<float, 4> parse_box(const std::string& text);
// "x,y,label;x,y,label"
std::vector<Point> parse_points(const std::string& text);

}  // namespace vesalius
