// A request and its answer, as models see them: nothing here knows a socket.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace vesalius {

struct Request {
    std::string body;
};

// Sends a piece of an answer that is written little by little; false once the client has gone.
using Write = std::function<bool(std::string_view piece)>;

struct Response {
    int status = 200;
    std::string type = "application/json";
    std::string body;
    // Where it is given, it writes the body instead, on the model's thread.
    std::function<void(const Write& write)> stream = nullptr;
};

// {"error": {"message": ...}}
Response error_response(int status, std::string_view message);

}  // namespace vesalius
