// torch.nn.functional.interpolate(mode="bilinear", align_corners=False), one row at a time.
#pragma once

#include <vector>

namespace vesalius {

struct Plane {
    int width = 0, height = 0;
    std::vector<float> values;

    const float* row(int y) const { return values.data() + static_cast<std::size_t>(y) * width; }
};

// A plane, of which the top left width x height count, brought to another size.
class Interpolation {
 public:
    Interpolation(const Plane& plane, int width, int height, int to_width, int to_height);

    void row(int y, float* to) const;

 private:
    struct Pair {
        int first, second;
        float weight;  // of the second
    };
    static std::vector<Pair> pairs(int from, int to);

    const Plane& plane_;
    std::vector<Pair> columns_, rows_;
};

Plane interpolate(const Plane& plane, int width, int height);

}  // namespace vesalius
