// The JSON of POST /segment: an image, or the id of one that was sent before, and prompts in its pixels.
//
//     {"image": "data:image/png;base64,..." | "image_id": "...", "boxes": [[x1, y1, x2, y2], ...], "points": [[[x, y, label], ...],
//     ...]}
//
// Where both are given, the first box and the first points are one prompt, and so on.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "segmenter/prompt.hpp"

namespace vesalius {

struct SegmentRequest {
    std::string image;     // the file's bytes; "" where only the id is given
    std::string image_id;  // their SHA-256
    std::vector<Prompt> prompts;

    // InputError, one line, where it is not as above.
    static SegmentRequest parse(std::string_view body);
};

}  // namespace vesalius
