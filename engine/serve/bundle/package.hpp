// One AOTInductor package, ready to run. Its source is the one file that includes torch.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle/tensor.hpp"

namespace vesalius {

// Torch that the binaries were built with: "2.13.0".
std::string torch_version();

// Threads of one run.
void set_threads(int threads);

class Package {
 public:
    // `constants`, by the names that the package knows, stay where they are and are used in place. InputError where the file is no
    // such package or asks for other constants.
    Package(const std::filesystem::path& file, const std::map<std::string, Tensor>& constants);
    ~Package();
    Package(Package&&) noexcept;
    Package& operator=(Package&&) noexcept;

    // Inputs in the package's order, which it may change in place (a cache). What torch throws comes on as std::runtime_error.
    std::vector<Tensor> run(const std::vector<Tensor>& inputs);

 private:
    struct Loaded;
    std::unique_ptr<Loaded> loaded_;
};

}  // namespace vesalius
