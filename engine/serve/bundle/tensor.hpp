// A dense tensor of whoever owns its memory: a mapped file, a vector, or a result of torch. It knows nothing of torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vesalius {

enum class DType { float32, float16, bfloat16, int64, int32, uint8, boolean };

std::size_t item_size(DType dtype);
std::string_view name(DType dtype);                 // as the manifest has it: "float32"
DType dtype_named(std::string_view name);           // InputError for any other
DType dtype_of_safetensors(std::string_view code);  // "F32"

using Shape = std::vector<std::int64_t>;

std::int64_t count(const Shape& shape);
std::string to_string(const Shape& shape);  // "[1, 3, 256, 256]"

struct Tensor {
    DType dtype = DType::float32;
    Shape shape;
    std::shared_ptr<void> memory;  // of the first element; holds what owns it

    std::int64_t numel() const { return count(shape); }
    template <typename T>
    T* data() const {
        return static_cast<T*>(memory.get());
    }
};

// Zeros.
Tensor make_tensor(DType dtype, Shape shape);
// Takes the values over.
Tensor make_tensor(std::vector<float> values, Shape shape);
Tensor make_tensor(std::vector<std::int64_t> values, Shape shape);
// As float32; the tensor itself where it is.
Tensor to_float(const Tensor& tensor);
// float32 rounded to a half type, to the nearest (of two the even one); the tensor itself for float32. std::logic_error for others.
Tensor from_float(const Tensor& tensor, DType dtype);
bool is_floating(DType dtype);

}  // namespace vesalius
