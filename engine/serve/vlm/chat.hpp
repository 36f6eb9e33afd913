// A conversation as the text that the model was trained on, put together of the segments that the export rendered.
#pragma once

#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace vesalius {

struct ChatPart {
    bool image = false;  // else text
    std::string text;
};

struct ChatMessage {
    std::string role;
    std::vector<ChatPart> parts;
};

class Chat {
 public:
    // The manifest's `chat`; InputError where it is not whole.
    static Chat parse(const nlohmann::json& entry);

    // The text up to where the answer begins. InputError for a role that the template does not know, and where there is no message.
    std::string render(const std::vector<ChatMessage>& messages) const;

 private:
    std::string opening_, image_, answer_;
    std::map<std::string, std::array<std::string, 2>> roles_;  // what stands before and after a message's content
};

}  // namespace vesalius
