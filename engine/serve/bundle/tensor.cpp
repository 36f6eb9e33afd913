#include "bundle/tensor.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

struct Kind {
    DType dtype;
    std::string_view name, safetensors;
    std::size_t size;
};

constexpr std::array<Kind, 7> KINDS{{
    {DType::float32, "float32", "F32", 4},
    {DType::float16, "float16", "F16", 2},
    {DType::bfloat16, "bfloat16", "BF16", 2},
    {DType::int64, "int64", "I64", 8},
    {DType::int32, "int32", "I32", 4},
    {DType::uint8, "uint8", "U8", 1},
    {DType::boolean, "bool", "BOOL", 1},
}};

const Kind& kind(DType dtype) { return KINDS[static_cast<std::size_t>(dtype)]; }

template <typename T>
Tensor take(DType dtype, std::vector<T> values, Shape shape) {
    if (static_cast<std::int64_t>(values.size()) != count(shape)) {
        throw std::logic_error(std::to_string(values.size()) + " values are no tensor " + to_string(shape));
    }
    auto owner = std::make_shared<std::vector<T>>(std::move(values));
    return {dtype, std::move(shape), std::shared_ptr<void>(owner, owner->data())};
}

float from_half(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits & 0x8000 ? -1.0F : 1.0F;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    if (exponent == 31) {
        return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
    }
    return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

// Rounds away the lowest `bits`, which carries into the exponent as it should.
std::uint32_t round_off(std::uint32_t value, int bits) {
    const std::uint32_t half = (1U << (bits - 1)) - 1;
    return (value + half + (value >> bits & 1)) >> bits;
}

std::uint16_t to_brain(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    return static_cast<std::uint16_t>(std::isnan(value) ? bits >> 16 | 0x40 : round_off(bits, 16));
}

std::uint16_t to_half(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7E00);             // not a number
    if (size >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);            // 65520 and more: infinite
    if (size >= 0x38800000) return static_cast<std::uint16_t>(sign | round_off(size - 0x38000000, 13));
    const auto steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(std::abs(value), 24)));  // subnormal
    return static_cast<std::uint16_t>(sign | steps);
}

}  // namespace

std::size_t item_size(DType dtype) { return kind(dtype).size; }

std::string_view name(DType dtype) { return kind(dtype).name; }

DType dtype_named(std::string_view name) {
    for (const Kind& kind : KINDS) {
        if (kind.name == name) return kind.dtype;
    }
    throw InputError("no dtype is called '" + one_line(name, 40) + "'");
}

DType dtype_of_safetensors(std::string_view code) {
    for (const Kind& kind : KINDS) {
        if (kind.safetensors == code) return kind.dtype;
    }
    throw InputError("no dtype is called '" + one_line(code, 40) + "'");
}

std::int64_t count(const Shape& shape) {
    std::int64_t product = 1;
    for (const std::int64_t side : shape) product *= side;
    return product;
}

std::string to_string(const Shape& shape) {
    std::string text = "[";
    for (const std::int64_t side : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(side);
    return text + "]";
}

Tensor make_tensor(DType dtype, Shape shape) {
    auto owner = std::make_shared<std::vector<std::uint64_t>>((count(shape) * item_size(dtype) + 7) / 8);
    return {dtype, std::move(shape), std::shared_ptr<void>(owner, owner->data())};
}

Tensor make_tensor(std::vector<float> values, Shape shape) { return take(DType::float32, std::move(values), std::move(shape)); }

Tensor make_tensor(std::vector<std::int64_t> values, Shape shape) {
    return take(DType::int64, std::move(values), std::move(shape));
}

Tensor to_float(const Tensor& tensor) {
    if (tensor.dtype == DType::float32) return tensor;
    if (tensor.dtype != DType::float16 && tensor.dtype != DType::bfloat16) {
        throw InputError("a tensor of " + std::string(name(tensor.dtype)) + " where floating numbers were expected");
    }
    const auto* const bits = tensor.data<std::uint16_t>();
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = tensor.dtype == DType::float16 ? from_half(bits[i]) : std::bit_cast<float>(std::uint32_t{bits[i]} << 16);
    }
    return make_tensor(std::move(values), tensor.shape);
}

Tensor from_float(const Tensor& tensor, DType dtype) {
    if (dtype == DType::float32) return tensor;
    if (tensor.dtype != DType::float32 || !is_floating(dtype)) throw std::logic_error("only float32 is rounded, to a half type");
    const auto* const values = tensor.data<float>();
    Tensor rounded = make_tensor(dtype, tensor.shape);
    auto* const bits = rounded.data<std::uint16_t>();
    for (std::int64_t i = 0; i < tensor.numel(); ++i) bits[i] = dtype == DType::float16 ? to_half(values[i]) : to_brain(values[i]);
    return rounded;
}

bool is_floating(DType dtype) { return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16; }

}  // namespace vesalius
