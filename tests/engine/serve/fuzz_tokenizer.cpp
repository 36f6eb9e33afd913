// libFuzzer: any bytes are a text that comes back from its tokens in normal form C, or an InputError; what begins with { is a
// tokenizer.json instead. The tokenizer is that of VESALIUS_TOKENIZER, a file whose normalizer is NFC.
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "bundle/errors.hpp"
#include "tokenizer/tokenizer.hpp"
#include "tokenizer/unicode.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace vesalius;
    static const Tokenizer known = Tokenizer::read(std::getenv("VESALIUS_TOKENIZER"));
    static const std::string file = "/tmp/fuzz_tokenizer." + std::to_string(::getpid()) + ".json";
    const std::string text(reinterpret_cast<const char*>(data), size);
    try {
        if (text.starts_with('{')) {
            std::ofstream(file, std::ios::binary) << text;
            const Tokenizer read = Tokenizer::read(file);
            read.decode(read.encode("a b ab<|im_end|>\n"));
        } else if (known.decode(known.encode(text), /*skip_special=*/false) != compose(text)) {
            std::abort();
        }
    } catch (const InputError&) {
    }
    return 0;
}
