// An answer's text as it comes: whole characters, and an end before the first of some texts.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace vesalius {

// Takes the next piece of an answer, whole characters; false ends the answer.
using OnPiece = std::function<bool(const std::string& piece)>;

class Pieces {
 public:
    // All that is said is appended to `text` and given to `on_piece`, where there is one. It ends where the first of `stops` to be
    // complete begins (of those that are complete at once, the longest), however tokens divide it. What may yet become one of them
    // is held back.
    Pieces(std::string& text, OnPiece on_piece, std::vector<std::string> stops = {});

    // A token's bytes; false where the answer is to end.
    bool add(std::string_view bytes);
    // Says what was held back, since nothing comes any more.
    void finish();
    // Whether one of `stops` ended it.
    bool stopped() const { return stopped_; }

 private:
    bool say(std::string piece);
    bool give(const std::string& bytes);

    std::string& text_;
    const OnPiece on_piece_;
    const std::vector<std::string> stops_;
    std::string rest_, held_;  // bytes of a character that is not whole; text that may be the beginning of a stop
    bool stopped_ = false;
};

}  // namespace vesalius
