// For tests: an image file as the binaries see it. `image_probe FILE` prints its width and height and writes its RGB bytes;
// `image_probe FILE PREPROCESSING` (JSON) writes the model's input in float32 instead. Errors as those of the binaries.
#include <iostream>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "images/decode.hpp"
#include "segmenter/frame.hpp"

int main(int argc, char** argv) try {
    using namespace vesalius;
    const Image image = open_image(argv[1]);
    std::cout << image.width << ' ' << image.height << '\n';
    if (argc > 2) {
        const Tensor input = Frame(image.width, image.height, Preprocessing::parse(nlohmann::json::parse(argv[2]))).input(image);
        std::cout.write(input.data<char>(), input.numel() * 4);
    } else {
        std::cout.write(reinterpret_cast<const char*>(image.values.data()), static_cast<long>(image.values.size()));
    }
} catch (const vesalius::InputError& error) {
    std::cerr << error.what() << '\n';
    return 2;
}
