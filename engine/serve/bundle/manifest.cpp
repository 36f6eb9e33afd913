#include "bundle/manifest.hpp"

#include <algorithm>
#include <filesystem>

#include "bundle/errors.hpp"
#include "bundle/sha256.hpp"

namespace vesalius {
namespace {

using nlohmann::json;

// A path that leads out of the bundle is refused.
std::string inside(const std::string& file) {
    const std::filesystem::path path(file);
    const bool leaves = path.empty() || path.is_absolute() || std::ranges::find(path, std::filesystem::path("..")) != path.end();
    if (leaves || file.find('\0') != std::string::npos) throw InputError("a file of it would lie outside the bundle");
    return file;
}

std::vector<TensorSpec> read_tensors(const json& entries) {
    std::vector<TensorSpec> tensors;
    for (const json& entry : entries) {
        TensorSpec tensor{entry.at("name").get<std::string>(), dtype_named(entry.at("dtype").get<std::string>()), {}};
        for (const json& side : entry.at("shape")) {
            if (side.is_string()) {
                tensor.shape.emplace_back(side.get<std::string>());
            } else {
                tensor.shape.emplace_back(side.get<std::int64_t>());
            }
        }
        tensors.push_back(std::move(tensor));
    }
    return tensors;
}

void read_version(const json& all) {
    if (all.at("format").get<std::string>() != "vesalius-bundle") throw InputError("not the manifest of a vesalius-bundle");
    if (const int version = all.at("format_version").get<int>(); version != 1) {
        throw InputError("format version " + std::to_string(version) + " (expected 1: another release of Vesalius wrote it)");
    }
}

}  // namespace

bool PackageSpec::takes(const std::string& input) const {
    return std::ranges::any_of(inputs, [&](const TensorSpec& tensor) { return tensor.name == input; });
}

Manifest Manifest::parse(const std::string& text, const std::string& path) {
    Manifest manifest;
    try {
        const json all = json::parse(text);
        read_version(all);
        manifest.kind = all.at("kind").get<std::string>();
        manifest.target = all.at("target").get<std::string>();
        manifest.device = all.at("device").get<std::string>();
        manifest.dtype = all.at("dtype").get<std::string>();
        manifest.instruction_set = all.at("instruction_set").get<std::string>();
        manifest.torch_version = all.at("versions").at("torch").get<std::string>();
        manifest.weights = inside(all.at("weights").get<std::string>());
        for (const auto& [file, entry] : all.at("files").items()) {
            manifest.files[inside(file)] = {entry.at("sha256").get<std::string>(), entry.at("bytes").get<std::uint64_t>()};
        }
        for (const auto& [name, entry] : all.at("packages").items()) {
            PackageSpec package{inside(entry.at("file").get<std::string>()), read_tensors(entry.at("inputs")),
                                read_tensors(entry.at("outputs")), entry.at("constants").get<std::map<std::string, std::string>>()};
            manifest.packages[name] = std::move(package);
        }
        const json dimensions = all.value("dimensions", json::object());
        for (const auto& [name, range] : dimensions.items()) {
            manifest.dimensions[name] = {range.at(0).get<std::int64_t>(), range.at(1).get<std::int64_t>()};
        }
        manifest.all = all;
    } catch (const json::exception& error) {
        throw InputError(path + ": not a whole manifest: " + one_line(error.what()));
    } catch (const InputError& error) {
        throw InputError(path + ": " + error.what());
    }
    manifest.sha256 = vesalius::sha256(as_bytes(text));
    return manifest;
}

void check_inputs(const PackageSpec& package, const std::map<std::string, Range>& dimensions, const std::vector<Tensor>& inputs) {
    if (inputs.size() != package.inputs.size()) {
        throw InputError(package.file + ": " + std::to_string(inputs.size()) + " inputs (expected " +
                         std::to_string(package.inputs.size()) + ")");
    }
    std::map<std::string, std::int64_t> bound;  // a named dimension is the same in all inputs
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const TensorSpec& spec = package.inputs[i];
        const Tensor& tensor = inputs[i];
        const std::string what =
            package.file + ": " + spec.name + " is " + std::string(name(tensor.dtype)) + to_string(tensor.shape);
        if (tensor.dtype != spec.dtype) throw InputError(what + " (expected " + std::string(name(spec.dtype)) + ")");
        if (tensor.shape.size() != spec.shape.size()) {
            throw InputError(what + " (expected " + std::to_string(spec.shape.size()) + " dimensions)");
        }
        for (std::size_t d = 0; d < spec.shape.size(); ++d) {
            const std::int64_t side = tensor.shape[d];
            if (const auto* const number = std::get_if<std::int64_t>(&spec.shape[d])) {
                if (side != *number)
                    throw InputError(what + " (expected " + std::to_string(*number) + " in place " + std::to_string(d) + ")");
                continue;
            }
            const std::string& named = std::get<std::string>(spec.shape[d]);
            const auto range = dimensions.find(named);
            if (range == dimensions.end()) throw InputError(package.file + ": the manifest gives no range of '" + named + "'");
            if (side < range->second.low || side > range->second.high) {
                throw InputError(what + " (expected " + std::to_string(range->second.low) + " to " +
                                 std::to_string(range->second.high) + " " + named + ")");
            }
            if (bound.emplace(named, side).first->second != side)
                throw InputError(what + " (expected as many " + named + " as before)");
        }
    }
}

}  // namespace vesalius
