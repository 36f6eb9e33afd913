#include "images/decode.hpp"

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

bool starts_with(Bytes file, std::string_view signature) {
    return std::string_view(reinterpret_cast<const char*>(file.data()), file.size()).starts_with(signature);
}

}  // namespace

Image decode_image(Bytes file, const std::string& name, std::size_t most_pixels) {
    static constexpr const char* expected = " (expected a whole PNG or JPEG file)";
    try {
        if (file.empty()) throw InputError("the file is empty");
        if (starts_with(file, "\x89PNG")) return decode_png(file, most_pixels);
        if (starts_with(file, "\xff\xd8\xff")) return decode_jpeg(file, most_pixels);
        throw InputError("neither PNG nor JPEG");
    } catch (const InputError& error) {
        throw InputError(name + ": " + error.what() + expected);
    }
}

Image open_image(const std::string& path) { return decode_image(as_bytes(read_file(path, LARGEST_IMAGE_FILE)), path); }

}  // namespace vesalius
