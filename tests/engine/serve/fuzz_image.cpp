// libFuzzer: any bytes are an image or an InputError, and an image survives the way into a model's square and back. What is made of
// a PNG mostly has the sums that its chunks should, without which libpng would read no further.
#include <zlib.h>

#include <algorithm>

#include "bundle/errors.hpp"
#include "images/decode.hpp"
#include "segmenter/frame.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, most);
    const auto is_png = [&] { return size > 8 && std::equal(data, data + 4, "\x89PNG", [](auto a, char b) { return a == static_cast<std::uint8_t>(b); }); };
    if (seed % 16 == 0 || !is_png()) return size;
    for (std::size_t at = 8; at + 12 <= size;) {
        const std::size_t length = std::size_t{data[at]} << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3];
        if (length > size - at - 12) break;
        const unsigned long sum = ::crc32(0, data + at + 4, static_cast<unsigned>(length + 4));
        for (int byte = 0; byte < 4; ++byte) data[at + 8 + length + byte] = static_cast<std::uint8_t>(sum >> (24 - 8 * byte));
        at += length + 12;
    }
    return size;
}

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
