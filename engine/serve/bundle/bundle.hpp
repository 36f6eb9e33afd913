// A bundle that engine/export wrote, checked: its manifest, its files against their hashes, and this machine against both.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "bundle/package.hpp"
#include "bundle/safetensors.hpp"

namespace vesalius {

// A package with what the manifest says of it.
class Module {
 public:
    Module(PackageSpec spec, std::map<std::string, Range> dimensions, Package package);

    const PackageSpec& spec() const { return spec_; }
    // By the manifest's order of inputs and outputs; float32 is rounded to the package's own type. InputError where an input is not
    // as the manifest has it.
    std::vector<Tensor> run(std::vector<Tensor> inputs);

 private:
    PackageSpec spec_;
    std::map<std::string, Range> dimensions_;
    Package package_;
};

class Bundle {
 public:
    // Reads and checks all of it. InputError, in one line, where it is not whole, of another kind, or not for this machine.
    Bundle(const std::filesystem::path& folder, const std::string& kind);

    const Manifest& manifest() const { return manifest_; }
    const std::filesystem::path& folder() const { return folder_; }
    bool has(const std::string& package) const { return manifest_.packages.contains(package); }
    // Loads a package with its weights; InputError where there is none of that name.
    Module load(const std::string& package) const;

 private:
    std::filesystem::path folder_;
    Manifest manifest_;
    std::shared_ptr<Safetensors> weights_;
};

}  // namespace vesalius
