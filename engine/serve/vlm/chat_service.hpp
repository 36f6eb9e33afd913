// A VLM behind the server: POST /v1/chat/completions, whole or as server-sent events.
#pragma once

#include <memory>

#include "http/model.hpp"
#include "vlm/completion_request.hpp"
#include "vlm/vlm.hpp"

namespace vesalius {

class ChatService : public Model {
 public:
    explicit ChatService(const Bundle& bundle);

    std::vector<Route> routes() override;
    std::string hash() const override { return hash_; }
    std::string listed() const override;
    std::string about() const override { return about_; }

 private:
    Response answer(const Request& request);

    Vlm vlm_;
    std::string name_, hash_, about_;
    std::uint64_t asked_ = 0;
};

}  // namespace vesalius
