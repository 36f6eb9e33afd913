// Tensors, safetensors and what a package's inputs are held to.
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>

#include "bundle/errors.hpp"
#include "bundle/instruction_set.hpp"
#include "bundle/manifest.hpp"
#include "bundle/safetensors.hpp"
#include "bundle/sha256.hpp"

namespace vesalius {
namespace {

std::string message(const std::function<void()>& run) {
    try {
        run();
    } catch (const InputError& error) {
        return error.what();
    }
    return "no error";
}

std::filesystem::path scratch() { return std::filesystem::temp_directory_path() / ("serve_test." + std::to_string(::getpid())); }

TEST(Sha256, IsTheStandards) {
    EXPECT_EQ(sha256(as_bytes("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Files, AreWrittenWholeOrNotAtAll) {
    write_file(scratch(), as_bytes("content"));
    EXPECT_EQ(read_file(scratch(), 7), "content");
    EXPECT_NE(message([] { read_file(scratch(), 6); }).find("7 bytes (expected at most 6)"), std::string::npos);
    std::filesystem::remove(scratch());
    EXPECT_NE(message([] { write_file(scratch() / "none", as_bytes("x")); }).find("cannot be written"), std::string::npos);
}

TEST(Tensor, HalfTypesBecomeFloats) {
    Tensor half = make_tensor(DType::float16, {5}), brain = make_tensor(DType::bfloat16, {2});
    const std::uint16_t halves[] = {0x3C00, 0xC100, 0x0001, 0x7C00, 0x3555}, brains[] = {0x3F80, 0xC020};
    std::memcpy(half.data<void>(), halves, sizeof halves);
    std::memcpy(brain.data<void>(), brains, sizeof brains);
    const Tensor floats = to_float(half);
    EXPECT_EQ(floats.data<float>()[0], 1.0F);
    EXPECT_EQ(floats.data<float>()[1], -2.5F);
    EXPECT_EQ(floats.data<float>()[2], 0x1p-24F);
    EXPECT_TRUE(std::isinf(floats.data<float>()[3]));
    EXPECT_NEAR(floats.data<float>()[4], 1.0 / 3, 1e-4);
    EXPECT_EQ(to_float(brain).data<float>()[1], -2.5F);
}

TEST(Tensor, FloatsBecomeTheNearestHalfNumbers) {
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<std::array<float, 3>> cases = {
        // a float, in float16, in bfloat16
        {1.0F, 1.0F, 1.0F},           {-0.1F, -0x1.998p-4F, -0x1.9ap-4F},  {0x1.002p0F, 1.0F, 1.0F},
        {0x1.006p0F, 0x1.008p0F, 1.0F}, {0x1.01p0F, 0x1.01p0F, 1.0F},        {0x1.03p0F, 0x1.03p0F, 0x1.04p0F},
        {65519.0F, 65504.0F, 65536.0F}, {65520.0F, inf, 65536.0F},          {0x1.8p-24F, 0x1p-23F, 0x1.8p-24F},
        {0x1p-25F, 0.0F, 0x1p-25F},     {0x1.ffep-15F, 0x1p-14F, 0x1p-14F}, {-3e38F, -inf, -0x1.c4p127F},
        {3.4e38F, inf, inf},
    };
    for (const auto& [value, half, brain] : cases) {
        const Tensor given = make_tensor(std::vector{value}, {1});
        EXPECT_EQ(to_float(from_float(given, DType::float16)).data<float>()[0], half) << value;
        EXPECT_EQ(to_float(from_float(given, DType::bfloat16)).data<float>()[0], brain) << value;
    }
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {  // each of them comes back
        for (const DType dtype : {DType::float16, DType::bfloat16}) {
            Tensor one = make_tensor(dtype, {1});
            *one.data<std::uint16_t>() = static_cast<std::uint16_t>(bits);
            const Tensor wide = to_float(one);
            if (std::isnan(*wide.data<float>())) {
                EXPECT_TRUE(std::isnan(*to_float(from_float(wide, dtype)).data<float>()));
            } else {
                ASSERT_EQ(*from_float(wide, dtype).data<std::uint16_t>(), bits);
            }
        }
    }
}

Tensor read_safetensors(const std::string& header, const std::string& data, const std::string& name) {
    const std::uint64_t length = header.size();
    write_file(scratch(), as_bytes(std::string(reinterpret_cast<const char*>(&length), 8) + header + data));
    const auto file = std::make_shared<MappedFile>(scratch());
    std::filesystem::remove(scratch());
    return Safetensors(file, "weights").at(name);
}

TEST(Safetensors, AreViewsOfTheFileOrCopiesWhereTheyLieAskew) {
    for (std::size_t spaces = 0; spaces < 4; ++spaces) {
        const Tensor a = read_safetensors(R"({"__metadata__": {"a": "b"}, "a": {"dtype": "I32", "shape": [2], "data_offsets": [4, 12]}})" +
                                              std::string(spaces, ' '),
                                          std::string("\1\0\0\0\2\0\0\0\3\0\0\0", 12), "a");
        EXPECT_EQ(a.shape, Shape{2});
        EXPECT_EQ(a.data<std::int32_t>()[1], 3);
    }
}

TEST(Safetensors, AreRefusedWhereTheyPointElsewhere) {
    const auto of = [](const std::string& entry) {
        return message([&] { read_safetensors("{\"a\": " + entry + "}", "12345678", "a"); });
    };
    EXPECT_EQ(of(R"({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]})"), "weights: a tensor lies outside the file");
    EXPECT_EQ(of(R"({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]})"), "weights: a tensor lies outside the file");
    EXPECT_EQ(of(R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})"),
              "weights: a tensor's bytes are not those of its shape");
    EXPECT_EQ(of(R"({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})"), "weights: a tensor of impossible shape");
    EXPECT_EQ(of(R"({"dtype": "F32", "shape": [4611686018427387904, 4611686018427387904], "data_offsets": [0, 8]})"),
              "weights: a tensor of impossible shape");
    EXPECT_EQ(of(R"({"dtype": "F8", "shape": [8], "data_offsets": [0, 8]})"), "weights: no dtype is called 'F8'");
    EXPECT_EQ(of(R"({"shape": [8]})"), "weights: not a safetensors file: its header is not what the format says");
}

TEST(Inputs, AreHeldToTheManifest) {
    const PackageSpec package{"p", {{"x", DType::float32, {"n", 2}}, {"y", DType::int64, {"n"}}}, {}, {}};
    const std::map<std::string, Range> dimensions{{"n", {1, 3}}};
    const auto of = [&](Tensor x, Tensor y) {
        return message([&] { check_inputs(package, dimensions, {std::move(x), std::move(y)}); });
    };
    const auto floats = [](Shape shape) { return make_tensor(DType::float32, std::move(shape)); };
    const auto longs = [](Shape shape) { return make_tensor(DType::int64, std::move(shape)); };
    EXPECT_EQ(of(floats({3, 2}), longs({3})), "no error");
    EXPECT_EQ(of(floats({4, 2}), longs({4})), "p: x is float32[4, 2] (expected 1 to 3 n)");
    EXPECT_EQ(of(floats({3, 1}), longs({3})), "p: x is float32[3, 1] (expected 2 in place 1)");
    EXPECT_EQ(of(floats({3, 2}), longs({2})), "p: y is int64[2] (expected as many n as before)");
    EXPECT_EQ(of(floats({3}), longs({3})), "p: x is float32[3] (expected 2 dimensions)");
    EXPECT_EQ(of(longs({3, 2}), longs({3})), "p: x is int64[3, 2] (expected float32)");
}

TEST(InstructionSet, AnUnknownWordIsLacking) {
    EXPECT_EQ(lacking_instructions(""), "");
    EXPECT_EQ(lacking_instructions("INVALID_VEC_ISA AVX9000 y"), "AVX9000 Y");
}

}  // namespace
}  // namespace vesalius
