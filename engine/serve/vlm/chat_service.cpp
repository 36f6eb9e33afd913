#include "vlm/chat_service.hpp"

#include <chrono>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "images/decode.hpp"

namespace vesalius {
namespace {

using nlohmann::ordered_json;

constexpr std::size_t LARGEST_IMAGE = std::size_t{1} << 25;  // pixels

std::string dump(const ordered_json& object) { return object.dump(-1, ' ', false, ordered_json::error_handler_t::replace); }

ordered_json usage(const Answer& answer) {
    const std::size_t prompt = answer.prompt_tokens, completion = answer.tokens.size();
    return {{"prompt_tokens", prompt}, {"completion_tokens", completion}, {"total_tokens", prompt + completion}};
}

const char* reason(const Answer& answer) { return answer.ended ? "stop" : "length"; }

}  // namespace

ChatService::ChatService(const Bundle& bundle) : vlm_(bundle), hash_(bundle.manifest().sha256) {
    const auto& all = bundle.manifest().all;
    name_ = all.contains("model") ? all["model"].value("name", "") : "";
    about_ = dump({{"status", "ok"},
                   {"kind", bundle.manifest().kind},
                   {"model", {{"name", name_}, {"manifest_sha256", hash_}}},
                   {"intended_use", all.value("intended_use", "")}});
}

std::string ChatService::listed() const {
    return dump({{"object", "list"},
                 {"data", ordered_json::array({{{"id", name_}, {"object", "model"}, {"created", 0}, {"owned_by", "vesalius"}}})}});
}

std::vector<Route> ChatService::routes() {
    return {{"/v1/chat/completions", 1, [this](std::span<const Request> requests) { return std::vector{answer(requests[0])}; }}};
}

Response ChatService::answer(const Request& request) {
    const auto asked = std::make_shared<const CompletionRequest>(CompletionRequest::parse(request.body));
    std::vector<Image> images;
    for (const std::string& file : asked->images) images.push_back(decode_image(as_bytes(file), "image", LARGEST_IMAGE));
    auto prompt = std::make_shared<const PreparedPrompt>(vlm_.prepare(asked->messages, images, asked->max_tokens));

    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const ordered_json head{{"id", "chatcmpl-" + hash_.substr(0, 8) + "-" + std::to_string(++asked_)},
                            {"object", asked->stream ? "chat.completion.chunk" : "chat.completion"},
                            {"created", std::chrono::duration_cast<std::chrono::seconds>(now).count()},
                            {"model", name_}};
    const auto with = [head](const char* key, const ordered_json& said, const ordered_json& finished) {
        ordered_json whole = head;
        whole["choices"] = ordered_json::array({{{"index", 0}, {key, said}, {"finish_reason", finished}}});
        return whole;
    };
    Response response;
    if (!asked->stream) {
        const Answer answer = vlm_.answer(*prompt, asked->max_tokens, asked->sampling, asked->stops);
        ordered_json body = with("message", {{"role", "assistant"}, {"content", answer.text}}, reason(answer));
        body["usage"] = usage(answer);
        response.body = dump(body) + '\n';
        return response;
    }
    response.type = "text/event-stream";
    response.stream = [this, asked, prompt, head, with](const Write& write) {
        const auto send = [&](const ordered_json& chunk) { return write("data: " + dump(chunk) + "\n\n"); };
        if (!send(with("delta", {{"role", "assistant"}, {"content", ""}}, nullptr))) return;
        const auto on_piece = [&](const std::string& piece) { return send(with("delta", {{"content", piece}}, nullptr)); };
        const Answer answer = vlm_.answer(*prompt, asked->max_tokens, asked->sampling, asked->stops, on_piece);
        send(with("delta", ordered_json::object(), reason(answer)));
        if (asked->usage_in_stream) {
            ordered_json last = head;
            last["choices"] = ordered_json::array();
            last["usage"] = usage(answer);
            send(last);
        }
        write("data: [DONE]\n\n");
    };
    return response;
}

}  // namespace vesalius
