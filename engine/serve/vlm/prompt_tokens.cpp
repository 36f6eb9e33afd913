#include "vlm/prompt_tokens.hpp"

#include <algorithm>
#include <string>

#include "bundle/errors.hpp"

namespace vesalius {

PromptTokens place_tokens(const std::vector<std::int64_t>& ids, std::int64_t image_token, const std::vector<Patches>& images,
                          int merge) {
    const auto places = static_cast<std::size_t>(std::ranges::count(ids, image_token));
    if (places != images.size()) {
        throw InputError("a prompt has " + std::to_string(places) + " places for images and " + std::to_string(images.size()) +
                         " images");
    }
    PromptTokens prompt;
    std::vector<std::int64_t> axes[3];
    const auto add = [&](std::int64_t id, std::int64_t time, std::int64_t row, std::int64_t column) {
        prompt.ids.push_back(id);
        axes[0].push_back(time);
        axes[1].push_back(row);
        axes[2].push_back(column);
    };
    auto image = images.begin();
    for (const std::int64_t id : ids) {
        if (id != image_token) {
            add(id, prompt.next, prompt.next, prompt.next);
            ++prompt.next;
            continue;
        }
        const std::int64_t rows = image->rows / merge, columns = image->columns / merge;
        for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t column = 0; column < columns; ++column) add(id, prompt.next, prompt.next + row, prompt.next + column);
        prompt.next += std::max(rows, columns);
        ++image;
    }
    for (const int axis : {1, 2}) axes[0].insert(axes[0].end(), axes[axis].begin(), axes[axis].end());
    prompt.positions = make_tensor(std::move(axes[0]), {3, 1, static_cast<std::int64_t>(prompt.ids.size())});
    return prompt;
}

}  // namespace vesalius
