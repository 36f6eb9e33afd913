#include "vlm/vlm.hpp"

#include <algorithm>
#include <numeric>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

// An entry of the manifest, read by `read`; errors name the manifest.
template <typename Read>
auto entry(const Bundle& bundle, const char* name, Read read) {
    const std::string path = (bundle.folder() / "manifest.json").string();
    try {
        return read(bundle.manifest().all.at(name));
    } catch (const nlohmann::json::exception& error) {
        throw InputError(path + ": " + name + ": " + one_line(error.what()));
    } catch (const InputError& error) {
        throw InputError(path + ": " + error.what());
    }
}

template <typename T>
T of_chat(const Bundle& bundle, const char* name) {
    return entry(bundle, "chat", [&](const nlohmann::json& chat) { return chat.at(name).get<T>(); });
}

// The caches of a package that ends in them: as many as its inputs beyond the first three, all of one shape.
std::vector<Tensor> make_caches(const Bundle& bundle, const Module& package) {
    std::vector<Tensor> caches;
    for (std::size_t input = 3; input < package.spec().inputs.size(); ++input) {
        Shape shape;
        for (const Side& side : package.spec().inputs[input].shape) {
            if (!std::holds_alternative<std::int64_t>(side))
                throw InputError(bundle.folder().string() + ": a cache without a fixed size");
            shape.push_back(std::get<std::int64_t>(side));
        }
        caches.push_back(make_tensor(package.spec().inputs[input].dtype, shape));
    }
    if (caches.empty()) throw InputError(bundle.folder().string() + ": " + package.spec().file + " takes no caches");
    return caches;
}

std::int64_t highest(const Bundle& bundle, const char* dimension) {
    const auto& all = bundle.manifest().dimensions;
    const auto found = all.find(dimension);
    if (found == all.end()) throw InputError(bundle.folder().string() + ": its manifest gives no range of '" + dimension + "'");
    return found->second.high;
}

std::int64_t fixed_side(const Bundle& bundle, const TensorSpec& tensor, std::size_t place) {
    if (place >= tensor.shape.size() || !std::holds_alternative<std::int64_t>(tensor.shape[place])) {
        throw InputError(bundle.folder().string() + ": its manifest gives no size of " + tensor.name);
    }
    return std::get<std::int64_t>(tensor.shape[place]);
}

std::span<const float> row(const Tensor& logits) { return {logits.data<float>(), static_cast<std::size_t>(logits.numel())}; }

}  // namespace

Vlm::Vlm(const Bundle& bundle)
    : patches_(entry(bundle, "preprocessing", PatchSettings::parse)),
      chat_(entry(bundle, "chat", Chat::parse)),
      tokenizer_(Tokenizer::read(bundle.folder() / "tokenizer.json")),
      vision_(bundle.load("vision")),
      prefill_(bundle.load("prefill")),
      decode_(bundle.load("decode")),
      caches_(make_caches(bundle, decode_)),
      ends_(of_chat<std::vector<std::int64_t>>(bundle, "eos_token_ids")),
      image_token_(of_chat<std::int64_t>(bundle, "image_token_id")),
      room_(highest(bundle, "length")),
      hidden_(fixed_side(bundle, prefill_.spec().inputs.at(2), 1)),
      penalty_(of_chat<double>(bundle, "repetition_penalty")) {
    if (prefill_.spec().inputs.size() != caches_.size() + 3)
        throw InputError(bundle.folder().string() + ": prefill and decode differ in their caches");
    if (vision_.spec().inputs.size() != (patches_.window > 0 ? 4 : 2))
        throw InputError(bundle.folder().string() + ": its vision package takes other inputs");
}

Tensor Vlm::features(const std::vector<Patches>& images) {
    if (images.empty()) return make_tensor(DType::float32, {1, hidden_});  // nothing reads them
    std::vector<float> values;
    for (const Patches& image : images) {
        std::vector<Tensor> inputs{image.values, image.positions};
        if (patches_.window > 0) inputs.insert(inputs.end(), {image.windows, image.slots});
        const Tensor found = to_float(vision_.run(inputs).at(0));
        values.insert(values.end(), found.data<float>(), found.data<float>() + found.numel());
    }
    const auto count = static_cast<std::int64_t>(values.size()) / hidden_;
    return make_tensor(std::move(values), {count, hidden_});
}

std::vector<Tensor> Vlm::with_caches(std::vector<Tensor> inputs) const {
    inputs.insert(inputs.end(), caches_.begin(), caches_.end());
    return inputs;
}

PreparedPrompt Vlm::prepare(const std::vector<ChatMessage>& messages, const std::vector<Image>& images,
                            std::int64_t max_new_tokens) const {
    for (const ChatMessage& message : messages) {
        for (const ChatPart& part : message.parts) {
            const std::string token = part.image ? "" : tokenizer_.special_in(part.text);
            if (!token.empty()) throw InputError("a text has '" + token + "', which the model would read as a token of its own");
        }
    }
    PreparedPrompt prompt;
    for (const Image& image : images) prompt.images.push_back(cut_patches(image, patches_));
    prompt.tokens = place_tokens(tokenizer_.encode(chat_.render(messages)), image_token_, prompt.images, patches_.merge);
    const auto length = static_cast<std::int64_t>(prompt.tokens.ids.size());
    if (length + max_new_tokens > room_) {
        throw InputError("the prompt has " + std::to_string(length) + " tokens, and the answer may have " +
                         std::to_string(max_new_tokens) + " (expected at most " + std::to_string(room_) + " together)");
    }
    return prompt;
}

Answer Vlm::answer(const PreparedPrompt& prompt, std::int64_t max_new_tokens, const Sampling& sampling,
                   const std::vector<std::string>& stops, const OnPiece& on_piece) {
    const auto& [ids, positions, next] = prompt.tokens;
    const auto length = static_cast<std::int64_t>(ids.size());
    Tensor logits =
        to_float(prefill_.run(with_caches({make_tensor(ids, {1, length}), positions, features(prompt.images)})).at(0));
    Sampler sampler(sampling, penalty_, logits.numel());
    for (const std::int64_t id : ids) sampler.see(id);
    Answer answer;
    answer.prompt_tokens = ids.size();
    Pieces pieces(answer.text, on_piece, stops);
    std::vector<std::int64_t> slots(ids.size());
    std::iota(slots.begin(), slots.end(), 0);
    for (std::int64_t step = 0; step < max_new_tokens; ++step) {
        const std::int64_t token = sampler.pick(row(logits));
        if (std::ranges::find(ends_, token) != ends_.end()) {
            answer.ended = true;
            break;
        }
        answer.tokens.push_back(token);
        sampler.see(token);
        if (!pieces.add(tokenizer_.bytes({token})) || step + 1 == max_new_tokens) break;
        slots.push_back(length + step);
        const std::vector<std::int64_t> position(3, next + step);
        const auto so_far = static_cast<std::int64_t>(slots.size());
        const std::vector<Tensor> one{make_tensor(std::vector{token}, {1, 1}), make_tensor(position, {3, 1, 1}),
                                      make_tensor(slots, {so_far})};
        logits = to_float(decode_.run(with_caches(one)).at(0));
    }
    pieces.finish();
    answer.ended = answer.ended || pieces.stopped();
    return answer;
}

}  // namespace vesalius
