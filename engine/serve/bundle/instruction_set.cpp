#include "bundle/instruction_set.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cctype>
#include <sstream>

namespace vesalius {
namespace {

#if defined(__x86_64__)
bool has_amx() {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned int bf16 = 1U << 22, tile = 1U << 24, int8 = 1U << 25;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & (bf16 | tile | int8)) == (bf16 | tile | int8);
}

bool has(const std::string& word) {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    if (word == "AVX2") return avx2;
    if (word == "AVX512") return avx512;
    if (word == "AVX512_VNNI") return avx512 && __builtin_cpu_supports("avx512vnni");
    if (word == "AMX_TILE") return has_amx();
    return word == "INVALID_VEC_ISA";  // torch's word for no vectors at all
}
#else
bool has(const std::string& word) {
#if defined(__aarch64__)
    if (word == "NEON" || word == "ASIMD") return true;
#endif
    return word == "INVALID_VEC_ISA";
}
#endif

}  // namespace

std::string lacking_instructions(const std::string& instruction_set) {
    std::string lacking;
    std::istringstream words(instruction_set);
    for (std::string word; words >> word;) {
        for (char& letter : word) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        if (!has(word)) lacking += (lacking.empty() ? "" : " ") + word;
    }
    return lacking;
}

}  // namespace vesalius
