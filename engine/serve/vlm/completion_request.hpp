// The JSON of POST /v1/chat/completions, as OpenAI's clients send it.
//
//     {"messages": [{"role": "user", "content": "text" | [{"type": "text", "text": ...},
//                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]}],
//      "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options": {"include_usage"}}
//
// What would change the answer and is not done here (tools, n above 1, ...) is refused rather than left out.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "vlm/chat.hpp"
#include "vlm/sampler.hpp"

namespace vesalius {

struct CompletionRequest {
    std::vector<ChatMessage> messages;
    std::vector<std::string> images;  // files' bytes, in the order of the messages' places for them
    std::int64_t max_tokens = 256;
    Sampling sampling;  // temperature 0, the likeliest token, unless it is given
    std::vector<std::string> stops;  // texts that end the answer before them
    bool stream = false, usage_in_stream = false;

    // InputError, one line, where it is not as above.
    static CompletionRequest parse(std::string_view body);
};

}  // namespace vesalius
