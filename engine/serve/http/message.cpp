#include "http/message.hpp"

#include <nlohmann/json.hpp>

namespace vesalius {

Response error_response(int status, std::string_view message) {
    const nlohmann::json body{{"error", {{"message", message}}}};
    // What is no UTF-8 in a message, which may quote the request, is replaced.
    return {status, "application/json", body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + '\n'};
}

}  // namespace vesalius
