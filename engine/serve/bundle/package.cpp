#include "bundle/package.hpp"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <array>
#include <utility>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

constexpr std::array<std::pair<DType, at::ScalarType>, 7> TYPES{{
    {DType::float32, at::kFloat},
    {DType::float16, at::kHalf},
    {DType::bfloat16, at::kBFloat16},
    {DType::int64, at::kLong},
    {DType::int32, at::kInt},
    {DType::uint8, at::kByte},
    {DType::boolean, at::kBool},
}};

at::Tensor to_torch(const Tensor& tensor) {
    // The deleter holds the memory for as long as torch does.
    const auto type = TYPES[static_cast<std::size_t>(tensor.dtype)].second;
    return at::from_blob(
        tensor.memory.get(), tensor.shape, [memory = tensor.memory](void*) {}, at::TensorOptions(type));
}

Tensor from_torch(const at::Tensor& result) {
    const at::Tensor tensor = result.contiguous();
    for (const auto& [ours, theirs] : TYPES) {
        if (tensor.scalar_type() == theirs) {
            return {ours, tensor.sizes().vec(), std::shared_ptr<void>(tensor.data_ptr(), [tensor](void*) {})};
        }
    }
    throw std::runtime_error("a package gave a tensor of a type that bundles do not have");
}

}  // namespace

struct Package::Loaded {
    Loaded(const std::filesystem::path& file, std::map<std::string, Tensor> used)
        : loader(file.string()), constants(std::move(used)) {}

    torch::inductor::AOTIModelPackageLoader loader;
    std::map<std::string, Tensor> constants;  // they must outlive the loader's use of them
};

std::string torch_version() {
    const std::string version = TORCH_VERSION;
    return version.substr(0, version.find('+'));
}

void set_threads(int threads) { at::set_num_threads(threads); }

Package::Package(const std::filesystem::path& file, const std::map<std::string, Tensor>& constants) {
    try {
        loaded_ = std::make_unique<Loaded>(file, constants);
        std::unordered_map<std::string, at::Tensor> tensors;
        for (const auto& [name, tensor] : constants) tensors.emplace(name, to_torch(tensor));
        loaded_->loader.load_constants(tensors, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    } catch (const std::exception& error) {
        throw InputError(file.string() + ": cannot be loaded: " + one_line(error.what()));
    }
}

Package::~Package() = default;
Package::Package(Package&&) noexcept = default;
Package& Package::operator=(Package&&) noexcept = default;

std::vector<Tensor> Package::run(const std::vector<Tensor>& inputs) {
    const c10::InferenceMode guard;
    std::vector<at::Tensor> arguments;
    for (const Tensor& tensor : inputs) arguments.push_back(to_torch(tensor));
    std::vector<Tensor> outputs;
    for (const at::Tensor& result : loaded_->loader.run(arguments)) outputs.push_back(from_torch(result));
    return outputs;
}

}  // namespace vesalius
