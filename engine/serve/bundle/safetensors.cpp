#include "bundle/safetensors.hpp"

#include <cstring>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

constexpr std::uint64_t LONGEST_HEADER = 100'000'000;  // the format's own limit

Tensor view(const std::shared_ptr<MappedFile>& file, std::size_t start, const nlohmann::json& entry) {
    const DType dtype = dtype_of_safetensors(entry.at("dtype").get<std::string>());
    const auto shape = entry.at("shape").get<Shape>();
    const auto offsets = entry.at("data_offsets").get<std::vector<std::uint64_t>>();
    const std::size_t room = file->size() - start;
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > room) throw InputError("a tensor lies outside the file");
    std::uint64_t bytes = item_size(dtype);
    for (const std::int64_t side : shape) {
        if (side < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(side), &bytes)) {
            throw InputError("a tensor of impossible shape");
        }
    }
    if (bytes != offsets[1] - offsets[0]) throw InputError("a tensor's bytes are not those of its shape");
    auto* const first = file->data() + start + offsets[0];
    if (reinterpret_cast<std::uintptr_t>(first) % item_size(dtype) != 0) {  // the format promises no alignment
        Tensor copy = make_tensor(dtype, shape);
        if (bytes > 0) std::memcpy(copy.data<void>(), first, bytes);
        return copy;
    }
    return {dtype, shape, std::shared_ptr<void>(file, first)};
}

}  // namespace

Safetensors::Safetensors(std::shared_ptr<MappedFile> file, const std::string& name) : name_(name) {
    std::uint64_t length = 0;
    if (file->size() >= sizeof length) std::memcpy(&length, file->data(), sizeof length);
    if (length == 0 || length > LONGEST_HEADER || length > file->size() - sizeof length) {
        throw InputError(name + ": not a whole safetensors file");
    }
    try {
        const auto* const first = file->data() + sizeof length;
        const auto header = nlohmann::json::parse(first, first + length);
        for (const auto& [key, entry] : header.items()) {
            if (key != "__metadata__") tensors_[key] = view(file, sizeof length + length, entry);
        }
    } catch (const nlohmann::json::exception&) {
        throw InputError(name + ": not a safetensors file: its header is not what the format says");
    } catch (const InputError& error) {
        throw InputError(name + ": " + error.what());
    }
}

const Tensor& Safetensors::at(const std::string& tensor) const {
    const auto found = tensors_.find(tensor);
    if (found == tensors_.end()) throw InputError(name_ + ": no tensor is called '" + one_line(tensor) + "'");
    return found->second;
}

}  // namespace vesalius
