#include "vlm/chat.hpp"

#include "bundle/errors.hpp"

namespace vesalius {

Chat Chat::parse(const nlohmann::json& entry) try {
    Chat chat;
    chat.opening_ = entry.at("opening").get<std::string>();
    chat.image_ = entry.at("image").get<std::string>();
    chat.answer_ = entry.at("answer").get<std::string>();
    chat.roles_ = entry.at("roles").get<decltype(chat.roles_)>();
    return chat;
} catch (const nlohmann::json::exception& error) {
    throw InputError("chat: " + one_line(error.what()));
}

std::string Chat::render(const std::vector<ChatMessage>& messages) const {
    if (messages.empty()) throw InputError("no messages");
    std::string text = messages.front().role == "system" ? "" : opening_;
    for (const ChatMessage& message : messages) {
        const auto role = roles_.find(message.role);
        if (role == roles_.end())
            throw InputError("role '" + one_line(message.role, 40) + "' (expected system, user or assistant)");
        text += role->second[0];
        for (const ChatPart& part : message.parts) text += part.image ? image_ : part.text;
        text += role->second[1];
    }
    return text + answer_;
}

}  // namespace vesalius
