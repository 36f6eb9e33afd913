// What the server asks of a model: its routes, and who it is.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "http/message.hpp"

namespace vesalius {

struct Route {
    std::string path;  // of POST requests with JSON
    // Requests that wait at the same time, at most so many, are answered in one call.
    std::size_t most_together = 1;
    // An answer a request, in their order, on the model's one thread. What it throws answers all of them: 400 for InputError, else
    // 500.
    std::function<std::vector<Response>(std::span<const Request>)> answer;
};

class Model {
 public:
    virtual ~Model() = default;
    virtual std::vector<Route> routes() = 0;
    virtual std::string hash() const = 0;   // for the audit
    virtual std::string listed() const { return ""; }  // JSON object that /v1/models gives, if any
    virtual std::string about() const = 0;  // JSON object that /healthz gives: status, kind, model, intended_use
};

}  // namespace vesalius
