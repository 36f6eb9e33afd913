// vesalius-vlm: an answer to a question about images, by a bundle of a Qwen-VL.
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/command.hpp"
#include "apps/serving.hpp"
#include "bundle/errors.hpp"
#include "bundle/package.hpp"
#include "images/decode.hpp"
#include "tokenizer/unicode.hpp"
#include "vlm/chat_service.hpp"
#include "vlm/vlm.hpp"

namespace {

struct Arguments {
    std::string bundle, prompt;
    std::vector<std::string> images;
    std::int64_t max_new_tokens = 256;
    vesalius::Sampling sampling;
    std::vector<std::string> stops;
    int threads = 0;
    vesalius::ServingFlags serving;
};

void answer(const Arguments& args) {
    using namespace vesalius;
    if (args.prompt.empty()) throw InputError("--prompt is missing");
    if (!is_utf8(args.prompt)) throw InputError("--prompt: not UTF-8");
    ChatMessage message{"user", {}};
    std::vector<Image> images;
    for (const std::string& file : args.images) {
        images.push_back(open_image(file));
        message.parts.push_back({true, ""});
    }
    message.parts.push_back({false, args.prompt});
    Vlm vlm(Bundle(args.bundle, "vlm"));

    const auto start = std::chrono::steady_clock::now();
    const auto print = [](const std::string& piece) { return static_cast<bool>(std::cout << piece << std::flush); };
    const Answer answer =
        vlm.answer(vlm.prepare({message}, images, args.max_new_tokens), args.max_new_tokens, args.sampling, args.stops, print);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

    const nlohmann::ordered_json headline{{"text", answer.text},
                                          {"tokens", answer.tokens},
                                          {"prompt_tokens", answer.prompt_tokens},
                                          {"finish_reason", answer.ended ? "stop" : "length"},
                                          {"seconds", seconds.count()}};
    std::cout << '\n' << headline.dump() << '\n';
}

void run(Arguments& args) {
    using namespace vesalius;
    if (args.threads > 0) set_threads(args.threads);
    if (!args.serving.wanted()) return answer(args);
    args.serving.options.check();
    ChatService service(Bundle(args.bundle, "vlm"));
    args.serving.run(service);
}

}  // namespace

int main(int argc, char** argv) {
    Arguments args;
    CLI::App app(
        "An answer to a question about images, printed as it comes. The last line is JSON: text, tokens, prompt_tokens, "
        "finish_reason, seconds.",
        "vesalius-vlm");
    app.add_option("BUNDLE", args.bundle, "A folder that python -m recipes.export wrote.")->required();
    app.add_option("--image", args.images, "A PNG or JPEG file; again for another. Without one, the question is about none.");
    app.add_option("--prompt", args.prompt, "The question.");
    app.add_option("--max-new-tokens", args.max_new_tokens, "Tokens that the answer may have.")->check(CLI::Range(1, 1 << 20));
    app.add_option("--temperature", args.sampling.temperature, "0: the likeliest token each time. Above: drawn.")
        ->check(CLI::Range(0.0, 100.0));
    app.add_option("--top-p", args.sampling.top_p, "Drawn from the fewest likely tokens with this share of the probability.")
        ->check(CLI::Range(0.0, 1.0));
    app.add_option("--stop", args.stops, "A text that ends the answer before it; again for another.")
        ->check([](const std::string& stop) {
            return stop.empty() || !vesalius::is_utf8(stop) ? "expected a text in UTF-8" : "";
        });
    app.add_option("--seed", args.sampling.seed, "Of what is drawn.");
    app.add_option("--threads", args.threads, "Threads of the model. 0: as torch chooses (OMP_NUM_THREADS).")
        ->check(CLI::Range(0, 1024));
    args.serving.add_to(app);
    return vesalius::run_command(app, argc, argv, [&] { run(args); });
}
