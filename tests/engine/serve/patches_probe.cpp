// patches_probe MANIFEST IMAGE: four int64 (rows and columns of patches, windows, their length), then what the vision tower is
// given: float32 patches, int64 positions, windows and slots. What tests/engine/serve compares with Python's image processor.
#include <iostream>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "images/decode.hpp"
#include "vlm/patches.hpp"

int main(int count, char** arguments) try {
    using namespace vesalius;
    if (count != 3) throw InputError("expected a manifest.json and an image");
    const auto manifest = nlohmann::json::parse(read_file(arguments[1], std::size_t{1} << 26));
    const Patches patches = cut_patches(open_image(arguments[2]), PatchSettings::parse(manifest.at("preprocessing")));
    const auto write = [](const void* data, std::int64_t bytes) { std::cout.write(static_cast<const char*>(data), bytes); };
    const bool windows = patches.windows.memory != nullptr;
    const std::int64_t sizes[4] = {patches.rows, patches.columns, windows ? patches.windows.shape[0] : 0,
                                   windows ? patches.windows.shape[1] : 0};
    write(sizes, sizeof sizes);
    write(patches.values.memory.get(), patches.values.numel() * 4);
    write(patches.positions.memory.get(), patches.positions.numel() * 8);
    if (windows) write(patches.windows.memory.get(), patches.windows.numel() * 8);
    if (windows) write(patches.slots.memory.get(), patches.slots.numel() * 8);
    return 0;
} catch (const std::exception& error) {
    std::cerr << "patches_probe: " << vesalius::one_line(error.what()) << '\n';
    return 2;
}
