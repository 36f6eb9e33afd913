// HTTP around a model: POST to its routes, GET / (a page), /healthz and /metrics. Limits on headers, bodies, time and waiting.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "http/model.hpp"

namespace vesalius {

struct ServerOptions {
    std::string host = "127.0.0.1";
    int port = 0;            // 0: any that is free
    std::string token;       // "" where none is demanded
    std::string audit;       // a file, or ""
    std::size_t queue = 64;  // requests that may wait
    std::size_t connections = 256;
    std::size_t body = std::size_t{32} << 20;  // bytes
    std::chrono::seconds patience{30};         // for a header, a body, and for a client to take its answer

    // InputError where they do not go together: a host that others reach needs a token.
    void check() const;
};

// Until SIGTERM or SIGINT, then what is in flight is finished. Once it listens it says on which port; by default as a line of JSON
// on standard output. InputError where the address cannot be had.
void serve(Model& model, const ServerOptions& options, const std::function<void(int port)>& listening = nullptr);

}  // namespace vesalius
