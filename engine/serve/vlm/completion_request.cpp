#include "vlm/completion_request.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "images/base64.hpp"

namespace vesalius {
namespace {

using nlohmann::json;

constexpr std::size_t MOST_MESSAGES = 256, MOST_IMAGES = 16;
constexpr std::int64_t MOST_TOKENS = 1 << 20;
constexpr std::size_t MOST_STOPS = 4, LONGEST_STOP = 1 << 10;  // of bytes
constexpr double HIGHEST_TEMPERATURE = 100;
constexpr std::array READ{"messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "stream",
                          "stream_options"};
constexpr std::array WITHOUT_EFFECT{"model", "user", "metadata", "store", "service_tier", "parallel_tool_calls"};

// What clients send to ask for what happens anyway.
const json USUAL = json::parse(R"({"n": [1], "presence_penalty": [0], "frequency_penalty": [0], "logprobs": [false], "tools": [[]],
    "top_logprobs": [0], "tool_choice": ["none", "auto"], "logit_bias": [{}], "response_format": [{"type": "text"}],
    "modalities": [["text"]]})");

template <std::size_t N>
bool has(const std::array<const char*, N>& names, const std::string& name) {
    return std::ranges::find(names, name) != names.end();
}

void check_names(const json& body) {
    for (const auto& [name, value] : body.items()) {
        const auto usual = USUAL.find(name);
        const bool as_usual = usual != USUAL.end() && std::ranges::find(*usual, value) != usual->end();
        if (!has(READ, name) && !has(WITHOUT_EFFECT, name) && !as_usual && !value.is_null()) {
            throw InputError("'" + one_line(name, 40) + "' is not supported here");
        }
    }
}

template <typename T>
T number(const json& body, const char* name, T low, T high, T otherwise) {
    const auto found = body.find(name);
    if (found == body.end() || found->is_null()) return otherwise;
    const bool fits = std::is_floating_point_v<T> ? found->is_number() : found->is_number_integer();
    if (!fits || *found < low || *found > high) {
        throw InputError(std::string(name) + ": expected a " + (std::is_floating_point_v<T> ? "" : "whole ") + "number from " +
                         json(low).dump() + " to " + json(high).dump());
    }
    return found->get<T>();
}

bool flag(const json& body, const char* name) {
    const auto found = body.find(name);
    if (found == body.end() || found->is_null()) return false;
    if (!found->is_boolean()) throw InputError(std::string(name) + ": expected true or false");
    return found->get<bool>();
}

const std::string& text(const json& entry, const char* name, const char* expected) {
    const auto found = entry.is_object() ? entry.find(name) : entry.end();
    if (!entry.is_object() || found == entry.end() || !found->is_string()) throw InputError(expected);
    return found->get_ref<const std::string&>();
}

void read_part(const json& part, ChatMessage& message, std::vector<std::string>& images) {
    static constexpr const char* expected = "content: expected parts of type text or image_url";
    const std::string& type = text(part, "type", expected);
    if (type == "text") {
        message.parts.push_back({false, text(part, "text", "a part of type text: expected a text")});
    } else if (type == "image_url" && part.contains("image_url")) {
        if (images.size() == MOST_IMAGES) throw InputError("more than " + std::to_string(MOST_IMAGES) + " images");
        images.push_back(
            decode_data_uri(text(part["image_url"], "url", "image_url: expected {\"url\": \"data:image/png;base64,...\"}")));
        message.parts.push_back({true, ""});
    } else {
        throw InputError(expected);
    }
}

void read_messages(const json& body, CompletionRequest& request) {
    const auto messages = body.find("messages");
    if (messages == body.end() || !messages->is_array() || messages->empty() || messages->size() > MOST_MESSAGES) {
        throw InputError("messages: expected a list of 1 to " + std::to_string(MOST_MESSAGES));
    }
    for (const json& entry : *messages) {
        ChatMessage message{text(entry, "role", "messages: expected a role and a content each"), {}};
        if (message.role == "developer") message.role = "system";  // OpenAI's newer name
        const auto content = entry.find("content");
        if (content != entry.end() && content->is_string()) {
            message.parts.push_back({false, content->get<std::string>()});
        } else if (content != entry.end() && content->is_array()) {
            for (const json& part : *content) read_part(part, message, request.images);
        } else {
            throw InputError("content: expected a text or a list of parts");
        }
        request.messages.push_back(std::move(message));
    }
}

void read_stops(const json& body, CompletionRequest& request) {
    const auto found = body.find("stop");
    if (found == body.end() || found->is_null()) return;
    const json all = found->is_array() ? *found : json::array({*found});
    for (const json& stop : all) {
        const std::size_t length = stop.is_string() ? stop.get_ref<const std::string&>().size() : 0;
        if (all.size() > MOST_STOPS || length == 0 || length > LONGEST_STOP) {
            throw InputError("stop: expected a text, or a list of up to " + std::to_string(MOST_STOPS) + ", each of 1 to " +
                             std::to_string(LONGEST_STOP) + " bytes");
        }
        request.stops.push_back(stop.get<std::string>());
    }
}

}  // namespace

CompletionRequest CompletionRequest::parse(std::string_view text) {
    const json body = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!body.is_object()) throw InputError("the body is no JSON object");
    check_names(body);
    CompletionRequest request;
    read_messages(body, request);
    const char* const most = body.contains("max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
    request.max_tokens = number<std::int64_t>(body, most, 1, MOST_TOKENS, request.max_tokens);
    request.sampling.temperature = number<double>(body, "temperature", 0, HIGHEST_TEMPERATURE, 0);
    request.sampling.top_p = number<double>(body, "top_p", 0, 1, 1);
    read_stops(body, request);
    request.sampling.seed = static_cast<std::uint64_t>(number<std::int64_t>(body, "seed", 0, INT64_MAX, 0));
    request.stream = flag(body, "stream");
    if (const auto options = body.find("stream_options"); options != body.end() && options->is_object()) {
        request.usage_in_stream = flag(*options, "include_usage");
    }
    return request;
}

}  // namespace vesalius
