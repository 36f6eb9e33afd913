#include "segmenter/service.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "images/base64.hpp"
#include "images/decode.hpp"

namespace vesalius {
namespace {

constexpr std::size_t MOST_TOGETHER = 16;
constexpr std::size_t LARGEST_IMAGE = std::size_t{1} << 25;  // pixels

std::string about_bundle(const Manifest& manifest) {
    const auto& all = manifest.all;
    const auto about = all.contains("model") ? all["model"] : nlohmann::json::object();
    return nlohmann::ordered_json{{"status", "ok"},
                                  {"kind", manifest.kind},
                                  {"model", {{"name", about.value("name", "")}, {"manifest_sha256", manifest.sha256}}},
                                  {"intended_use", all.value("intended_use", "")}}
        .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

SegmentService::SegmentService(const Bundle& bundle, std::size_t images)
    : segmenter_(bundle), hash_(bundle.manifest().sha256), about_(about_bundle(bundle.manifest())), most_images_(images) {}

std::vector<Route> SegmentService::routes() {
    return {{"/segment", MOST_TOGETHER, [this](std::span<const Request> requests) { return answer(requests); }}};
}

std::vector<Response> SegmentService::answer(std::span<const Request> requests) {
    std::vector<Response> responses(requests.size());
    std::map<std::string, std::vector<Asked>> images;
    for (std::size_t i = 0; i < requests.size(); ++i) {
        try {
            SegmentRequest request = SegmentRequest::parse(requests[i].body);
            const std::string id = request.image_id;
            images[id].push_back({std::move(request), i});
        } catch (const InputError& error) {
            responses[i] = error_response(400, error.what());
        }
    }
    for (auto& [id, asked] : images) {
        try {
            answer_image(asked, responses);
        } catch (const InputError& error) {  // of the image: it is the same for all
            for (const Asked& one : asked) responses[one.place] = error_response(400, error.what());
        }
    }
    return responses;
}

void SegmentService::answer_image(std::vector<Asked>& asked, std::vector<Response>& responses) {
    const std::string id = asked[0].request.image_id;
    const Embedding* const found = embedding(id, asked);
    if (found == nullptr) {
        for (const Asked& one : asked) responses[one.place] = error_response(404, "no such image_id is kept: send the image");
        return;
    }
    std::vector<Prompt> prompts;
    std::vector<std::pair<std::size_t, std::size_t>> places;  // of a prompt: which of those asked, and which of its masks
    std::vector<nlohmann::ordered_json> masks(asked.size());
    for (std::size_t i = 0; i < asked.size(); ++i) {
        const auto& wanted = asked[i].request.prompts;
        try {
            for (const Prompt& prompt : wanted) segmenter_.check(prompt, found->frame.width(), found->frame.height());
        } catch (const InputError& error) {
            responses[asked[i].place] = error_response(400, error.what());
            continue;
        }
        for (std::size_t m = 0; m < wanted.size(); ++m) {
            prompts.push_back(wanted[m]);
            places.emplace_back(i, m);
        }
        masks[i] = std::vector<nlohmann::ordered_json>(wanted.size());
    }
    segmenter_.segment(*found, prompts, [&](std::size_t prompt, const Segmentation& made) {
        const auto [i, m] = places[prompt];
        masks[i][m] = {{"png", encode_base64(as_bytes(encode_png(made.mask)))},
                       {"iou", made.iou},
                       {"area", std::ranges::count(made.mask.values, 255)}};
    });
    for (std::size_t i = 0; i < asked.size(); ++i) {
        if (masks[i].is_null()) continue;
        const nlohmann::ordered_json body{
            {"image_id", id}, {"width", found->frame.width()}, {"height", found->frame.height()}, {"masks", masks[i]}};
        responses[asked[i].place].body = body.dump() + '\n';
    }
}

const Embedding* SegmentService::embedding(const std::string& id, const std::vector<Asked>& asked) {
    const auto kept = std::ranges::find(kept_, id, &std::pair<std::string, Embedding>::first);
    if (kept != kept_.end()) {
        kept_.splice(kept_.begin(), kept_, kept);
        return &kept_.front().second;
    }
    const auto sent = std::ranges::find_if(asked, [](const Asked& one) { return !one.request.image.empty(); });
    if (sent == asked.end()) return nullptr;
    const Image image = decode_image(as_bytes(sent->request.image), "image", LARGEST_IMAGE);
    kept_.emplace_front(id, segmenter_.embed(image));
    if (kept_.size() > most_images_) kept_.pop_back();
    return &kept_.front().second;
}

}  // namespace vesalius
