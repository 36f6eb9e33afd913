#include "segmenter/segmenter.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

// What the manifest says, read by `read`, with the manifest's name before an error.
template <typename Read>
auto manifest_entry(const Bundle& bundle, Read read) {
    const std::string path = (bundle.folder() / "manifest.json").string();
    try {
        return read(bundle.manifest().all);
    } catch (const nlohmann::json::exception& error) {
        throw InputError(path + ": " + one_line(error.what()));
    } catch (const InputError& error) {
        throw InputError(path + ": " + error.what());
    }
}

float label(const Bundle& bundle, const char* name) {
    return manifest_entry(bundle, [&](const nlohmann::json& all) { return all.at("prompts").at("labels").at(name).get<float>(); });
}

bool takes(const Bundle& bundle, const char* kind) {
    return manifest_entry(bundle, [&](const nlohmann::json& all) { return all.at("prompts").at(kind).get<bool>(); });
}

Range range(const Bundle& bundle, const std::string& dimension) {
    const auto& dimensions = bundle.manifest().dimensions;
    const auto found = dimensions.find(dimension);
    if (found == dimensions.end() || found->second.low > found->second.high || found->second.high < 1) {
        throw InputError(bundle.folder().string() + ": its manifest gives no range of '" + dimension + "'");
    }
    return found->second;
}

}  // namespace

Segmenter::Segmenter(const Bundle& bundle)
    : preprocessing_(
          manifest_entry(bundle, [](const nlohmann::json& all) { return Preprocessing::parse(all.at("preprocessing")); })),
      encoder_(bundle.load("image_encoder")),
      decoder_(bundle.load("mask_decoder")),
      takes_box_(takes(bundle, "box")),
      takes_points_(takes(bundle, "points")),
      outside_(label(bundle, "outside")),
      inside_(label(bundle, "inside")),
      top_left_(label(bundle, "box_top_left")),
      bottom_right_(label(bundle, "box_bottom_right")),
      no_box_(label(bundle, "no_box")),
      prompts_(range(bundle, "prompts")),
      points_(range(bundle, "points")) {
    for (const char* const input : {"image_embeddings", "point_coords", "point_labels"}) {
        if (!decoder_.spec().takes(input)) throw InputError(bundle.folder().string() + ": its mask_decoder takes no " + input);
    }
}

Embedding Segmenter::embed(const Image& image) {
    const Frame frame(image.width, image.height, preprocessing_);
    return {frame, encoder_.run({frame.input(image)}).at(0)};
}

void Segmenter::check(const Prompt& prompt, int width, int height) const {
    check_prompt(prompt, width, height);
    if (prompt.box && !takes_box_) throw InputError("this bundle takes no boxes");
    if (!prompt.points.empty() && !takes_points_) throw InputError("this bundle takes no points");
    const std::int64_t most = points_.high - (prompt.box ? 2 : 1);  // a box takes two of them, and that there is none takes one
    if (static_cast<std::int64_t>(prompt.points.size()) > most) {
        throw InputError(std::to_string(prompt.points.size()) + " points (expected at most " + std::to_string(most) +
                         (prompt.box ? " with a box)" : " without a box)"));
    }
}

Segmenter::Tokens Segmenter::tokens(const Prompt& prompt, const Frame& frame) const {
    Tokens tokens;
    const auto add = [&](float x, float y, float label) {
        tokens.coords.insert(tokens.coords.end(), {x, y});
        tokens.labels.push_back(label);
    };
    for (const auto& [x, y, label] : prompt.points) add(frame.x(x), frame.y(y), label == 1 ? inside_ : outside_);
    if (prompt.box) {
        const auto [x1, y1, x2, y2] = *prompt.box;
        add(frame.x(x1), frame.y(y1), top_left_);
        add(frame.x(x2), frame.y(y2), bottom_right_);
    } else {
        add(0, 0, no_box_);
    }
    return tokens;
}

void Segmenter::segment(const Embedding& embedding, const std::vector<Prompt>& prompts, const Take& take) {
    std::vector<Tokens> rows;
    std::map<std::size_t, std::vector<std::size_t>> lengths;  // points of a prompt -> the prompts that have so many
    for (const Prompt& prompt : prompts) {
        check(prompt, embedding.frame.width(), embedding.frame.height());
        rows.push_back(tokens(prompt, embedding.frame));
        lengths[rows.back().labels.size()].push_back(rows.size() - 1);
    }
    const auto most = static_cast<std::size_t>(prompts_.high);
    for (const auto& [length, which] : lengths) {
        for (std::size_t start = 0; start < which.size(); start += most) {
            const auto first = which.begin() + static_cast<long>(start);
            decode(embedding, rows, {first, first + static_cast<long>(std::min(most, which.size() - start))}, take);
        }
    }
}

void Segmenter::decode(const Embedding& embedding, const std::vector<Tokens>& tokens, const std::vector<std::size_t>& which,
                       const Take& take) {
    const auto P = static_cast<std::int64_t>(which.size()), T = static_cast<std::int64_t>(tokens[which[0]].labels.size());
    std::vector<float> coords, labels;
    for (const std::size_t i : which) {
        coords.insert(coords.end(), tokens[i].coords.begin(), tokens[i].coords.end());
        labels.insert(labels.end(), tokens[i].labels.begin(), tokens[i].labels.end());
    }
    std::vector<Tensor> inputs;
    for (const TensorSpec& input : decoder_.spec().inputs) {
        if (input.name == "image_embeddings") inputs.push_back(embedding.values);
        if (input.name == "point_coords") inputs.push_back(make_tensor(coords, {P, T, 2}));
        if (input.name == "point_labels") inputs.push_back(make_tensor(labels, {P, T}));
    }
    const std::vector<Tensor> outputs = decoder_.run(inputs);
    const Tensor masks = to_float(outputs.at(0)), ious = to_float(outputs.at(1));
    if (masks.shape.size() != 4 || masks.shape[0] != P || masks.shape[2] != masks.shape[3] || ious.numel() != P * masks.shape[1]) {
        throw std::runtime_error(decoder_.spec().file + ": masks " + to_string(masks.shape) + " and IoU " + to_string(ious.shape));
    }
    const std::int64_t M = masks.shape[1], side = masks.shape[3];
    for (std::int64_t p = 0; p < P; ++p) {
        const float* const iou = ious.data<float>() + p * M;
        const std::int64_t best = std::max_element(iou, iou + M) - iou;
        const float* const logits = masks.data<float>() + (p * M + best) * side * side;
        take(which[static_cast<std::size_t>(p)], {embedding.frame.mask(logits, static_cast<int>(side)), iou[best]});
    }
}

}  // namespace vesalius
