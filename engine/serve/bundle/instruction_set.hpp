#pragma once

#include <string>

namespace vesalius {

// What this processor lacks of the instruction set that packages were compiled for, as torch names it ("AVX512 AVX512_VNNI");
// "" where it lacks nothing. A word that is not known counts as lacking.
std::string lacking_instructions(const std::string& instruction_set);

}  // namespace vesalius
