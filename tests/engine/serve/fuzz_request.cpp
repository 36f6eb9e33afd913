// libFuzzer: any bytes are a request of POST /segment or /v1/chat/completions, a manifest, or an InputError.
#include "bundle/errors.hpp"
#include "bundle/manifest.hpp"
#include "segmenter/request.hpp"
#include "vlm/completion_request.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace vesalius;
    const std::string text(reinterpret_cast<const char*>(data), size);
    try {
        for (const Prompt& prompt : SegmentRequest::parse(text).prompts) check_prompt(prompt, 100, 100);
    } catch (const InputError&) {
    }
    try {
        CompletionRequest::parse(text);
    } catch (const InputError&) {
    }
    try {
        Manifest::parse(text, "manifest.json");
    } catch (const InputError&) {
    }
    return 0;
}
