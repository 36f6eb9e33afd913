#pragma once

#include <CLI/CLI.hpp>
#include <optional>

#include "http/server.hpp"

namespace vesalius {

// The flags of a binary's server; it is asked for by --serve.
struct ServingFlags {
    std::optional<int> port;
    ServerOptions options;

    void add_to(CLI::App& app);
    bool wanted() const { return port.has_value(); }
    void run(Model& model);
};

}  // namespace vesalius
