#include "bundle/bundle.hpp"

#include <algorithm>

#include "bundle/errors.hpp"
#include "bundle/instruction_set.hpp"
#include "bundle/sha256.hpp"

namespace vesalius {
namespace {

constexpr std::size_t LARGEST_MANIFEST = 64 << 20;

Manifest read_manifest(const std::filesystem::path& folder) {
    const auto path = folder / "manifest.json";
    if (!std::filesystem::is_directory(folder)) throw InputError(folder.string() + ": no such folder (expected a bundle)");
    if (!std::filesystem::exists(path)) throw InputError(folder.string() + ": not a bundle: it holds no manifest.json");
    return Manifest::parse(read_file(path, LARGEST_MANIFEST), path.string());
}

void check_machine(const Manifest& manifest, const std::string& bundle, const std::string& kind) {
    const auto expect = [&](const std::string& what, const std::string& is, const std::string& expected) {
        if (is != expected)
            throw InputError(bundle + ": its " + what + " is '" + one_line(is, 40) + "' (expected '" + expected + "')");
    };
    expect("kind", manifest.kind, kind);
    expect("target", manifest.target, "aoti");
    expect("device", manifest.device, "cpu");
    expect("torch", manifest.torch_version.substr(0, manifest.torch_version.find('+')), torch_version());
    if (const std::string lacking = lacking_instructions(manifest.instruction_set); !lacking.empty()) {
        throw InputError(bundle + ": compiled for '" + one_line(manifest.instruction_set, 80) + "', and this processor lacks " +
                         one_line(lacking, 80) + ": export it on a machine like this one");
    }
}

// Returns the mapping of the weights' file, whose bytes are those that were checked.
std::shared_ptr<MappedFile> check_files(const Manifest& manifest, const std::filesystem::path& folder) {
    std::shared_ptr<MappedFile> weights;
    for (const auto& [name, expected] : manifest.files) {
        const auto path = folder / name;
        if (!std::filesystem::exists(path)) throw InputError(path.string() + ": missing, and the bundle's manifest names it");
        const auto file = std::make_shared<MappedFile>(path);
        if (file->size() != expected.bytes) {
            throw InputError(path.string() + ": " + std::to_string(file->size()) + " bytes (expected " +
                             std::to_string(expected.bytes) + ")");
        }
        if (sha256(file->bytes()) != expected.sha256)
            throw InputError(path.string() + ": changed since the export: another SHA-256");
        if (name == manifest.weights) weights = file;
    }
    if (weights == nullptr) throw InputError(folder.string() + ": its manifest gives no hash of " + manifest.weights);
    for (const auto& [name, package] : manifest.packages) {
        if (!manifest.files.contains(package.file))
            throw InputError(folder.string() + ": its manifest gives no hash of " + package.file);
    }
    return weights;
}

}  // namespace

Module::Module(PackageSpec spec, std::map<std::string, Range> dimensions, Package package)
    : spec_(std::move(spec)), dimensions_(std::move(dimensions)), package_(std::move(package)) {}

std::vector<Tensor> Module::run(std::vector<Tensor> inputs) {
    for (std::size_t i = 0; i < std::min(inputs.size(), spec_.inputs.size()); ++i) {
        const DType wanted = spec_.inputs[i].dtype;
        if (inputs[i].dtype == DType::float32 && is_floating(wanted)) inputs[i] = from_float(inputs[i], wanted);
    }
    check_inputs(spec_, dimensions_, inputs);
    auto outputs = package_.run(inputs);
    if (outputs.size() != spec_.outputs.size()) {
        throw std::runtime_error(spec_.file + ": " + std::to_string(outputs.size()) + " outputs (expected " +
                                 std::to_string(spec_.outputs.size()) + ")");
    }
    return outputs;
}

Bundle::Bundle(const std::filesystem::path& folder, const std::string& kind) : folder_(folder), manifest_(read_manifest(folder)) {
    check_machine(manifest_, folder.string(), kind);
    const auto weights = check_files(manifest_, folder);
    weights_ = std::make_shared<Safetensors>(weights, (folder / manifest_.weights).string());
}

Module Bundle::load(const std::string& package) const {
    const auto found = manifest_.packages.find(package);
    if (found == manifest_.packages.end()) throw InputError(folder_.string() + ": it has no package '" + package + "'");
    std::map<std::string, Tensor> constants;
    for (const auto& [fqn, tensor] : found->second.constants) constants[fqn] = weights_->at(tensor);
    return {found->second, manifest_.dimensions, Package(folder_ / found->second.file, constants)};
}

}  // namespace vesalius
