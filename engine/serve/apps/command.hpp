// What the binaries' main functions share: a user's mistake is one line on standard error and exit code 2.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace vesalius {

// Parses argv, then runs; returns the exit code.
int run_command(CLI::App& app, int argc, char** argv, const std::function<void()>& run);

}  // namespace vesalius
