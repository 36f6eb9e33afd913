// manifest.json of a bundle: what engine/export wrote, as far as the binaries read it.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bundle/tensor.hpp"

namespace vesalius {

using Side = std::variant<std::int64_t, std::string>;  // a number, or the name of a dimension

struct TensorSpec {
    std::string name;
    DType dtype = DType::float32;
    std::vector<Side> shape;
};

struct PackageSpec {
    std::string file;
    std::vector<TensorSpec> inputs, outputs;
    std::map<std::string, std::string> constants;  // as the package knows it -> in the weights' file

    bool takes(const std::string& input) const;
};

struct FileSpec {
    std::string sha256;
    std::uint64_t bytes = 0;
};

struct Range {
    std::int64_t low = 1, high = 1;  // both included
};

struct Manifest {
    std::string kind, target, device, dtype, instruction_set, torch_version, weights;
    std::map<std::string, FileSpec> files;
    std::map<std::string, PackageSpec> packages;
    std::map<std::string, Range> dimensions;
    std::string sha256;  // of manifest.json itself, which names all other files' hashes: the bundle's own hash
    nlohmann::json all;  // the whole of it: preprocessing, chat, prompts, model, intended use

    // InputError, which names `path`, where it is no manifest of ours.
    static Manifest parse(const std::string& text, const std::string& path);
};

// Checks shapes and dtypes of a package's inputs; InputError names the tensor and what was expected.
void check_inputs(const PackageSpec& package, const std::map<std::string, Range>& dimensions, const std::vector<Tensor>& inputs);

}  // namespace vesalius
