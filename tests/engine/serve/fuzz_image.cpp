// libFuzzer: any bytes are an image or an InputError, and an image survives the way into a model's square and back.
#include "bundle/errors.hpp"
#include "images/decode.hpp"
#include "segmenter/frame.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace vesalius;
    try {
        const Image image = decode_image({data, size}, "image", 1 << 16);
        Preprocessing how;
        how.size = 32;
        how.min_max = true;
        how.std = {1, 1, 1};
        const Frame frame(image.width, image.height, how);
        const Tensor input = frame.input(image);
        encode_png(frame.mask(input.data<float>(), 32));
    } catch (const InputError&) {
    }
    return 0;
}
