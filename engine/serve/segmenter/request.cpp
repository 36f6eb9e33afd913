#include "segmenter/request.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "bundle/sha256.hpp"
#include "images/base64.hpp"

namespace vesalius {
namespace {

using nlohmann::json;

constexpr std::size_t MOST_PROMPTS = 64, MOST_POINTS = 256;

// A row of finite numbers of a JSON array.
template <std::size_t N>
std::array<float, N> row(const json& entry, const char* expected) {
    std::array<float, N> numbers{};
    const bool fits =
        entry.is_array() && entry.size() == N && std::ranges::all_of(entry, [](const json& x) { return x.is_number(); });
    for (std::size_t i = 0; fits && i < N; ++i) numbers[i] = entry[i].get<float>();
    if (!fits || !std::ranges::all_of(numbers, [](float x) { return std::isfinite(x); })) throw InputError(expected);
    return numbers;
}

std::vector<Point> read_points(const json& entry) {
    static constexpr const char* expected = "points: expected a list of [x, y, label] for each prompt";
    if (!entry.is_array() || entry.size() > MOST_POINTS) throw InputError(expected);
    std::vector<Point> points;
    for (const json& point : entry) {
        const auto [x, y, label] = row<3>(point, expected);
        if (label != 0 && label != 1) throw InputError("points: expected labels 1 (inside) or 0 (outside)");
        points.push_back({x, y, static_cast<int>(label)});
    }
    return points;
}

const json& list(const json& body, const char* key) {
    static const json none = json::array();
    const auto found = body.find(key);
    if (found == body.end()) return none;
    if (!found->is_array() || found->size() > MOST_PROMPTS) {
        throw InputError(std::string(key) + ": expected a list of at most " + std::to_string(MOST_PROMPTS));
    }
    return *found;
}

std::vector<Prompt> read_prompts(const json& body) {
    const json &boxes = list(body, "boxes"), &points = list(body, "points");
    if (boxes.empty() && points.empty()) throw InputError("expected boxes, points, or both");
    if (!boxes.empty() && !points.empty() && boxes.size() != points.size()) {
        throw InputError(std::to_string(boxes.size()) + " boxes and points for " + std::to_string(points.size()) +
                         " prompts (expected as many)");
    }
    std::vector<Prompt> prompts(std::max(boxes.size(), points.size()));
    for (std::size_t i = 0; i < prompts.size(); ++i) {
        if (!boxes.empty()) prompts[i].box = row<4>(boxes[i], "boxes: expected [x1, y1, x2, y2] for each prompt");
        if (!points.empty()) prompts[i].points = read_points(points[i]);
    }
    return prompts;
}

}  // namespace

SegmentRequest SegmentRequest::parse(std::string_view text) {
    const json body = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!body.is_object()) throw InputError("the body is no JSON object");
    SegmentRequest request;
    for (const auto& [key, value] : body.items()) {
        if (key != "image" && key != "image_id" && key != "boxes" && key != "points") {
            throw InputError("'" + one_line(key, 40) + "' is not known (expected image or image_id, boxes, points)");
        }
    }
    const bool image = body.contains("image"), id = body.contains("image_id");
    if (image == id) throw InputError("expected either image or image_id");
    const json& given = body.at(image ? "image" : "image_id");
    if (!given.is_string()) throw InputError(std::string(image ? "image" : "image_id") + ": expected text");
    if (image) {
        request.image = decode_data_uri(given.get_ref<const std::string&>());
        request.image_id = sha256(as_bytes(request.image));
    } else {
        request.image_id = given.get<std::string>();
    }
    request.prompts = read_prompts(body);
    return request;
}

}  // namespace vesalius
