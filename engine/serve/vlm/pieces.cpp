#include "vlm/pieces.hpp"

#include <algorithm>
#include <utility>

#include "tokenizer/unicode.hpp"

namespace vesalius {

Pieces::Pieces(std::string& text, OnPiece on_piece, std::vector<std::string> stops)
    : text_(text), on_piece_(std::move(on_piece)), stops_(std::move(stops)) {}

bool Pieces::add(std::string_view bytes) {
    rest_.append(bytes);
    const std::size_t whole = rest_.size() - unfinished(rest_);
    const bool goes_on = give(rest_.substr(0, whole));
    rest_.erase(0, whole);
    return goes_on;
}

void Pieces::finish() {
    if (stopped_) return;
    give(rest_);
    if (!stopped_) say(std::move(held_));
}

bool Pieces::give(const std::string& bytes) {
    if (bytes.empty()) return true;
    std::string text = held_ + mend(bytes);
    std::size_t start = std::string::npos, end = std::string::npos;
    for (const std::string& stop : stops_) {
        const std::size_t found = text.find(stop);
        if (found == std::string::npos) continue;
        if (found + stop.size() < end || (found + stop.size() == end && found < start)) {
            start = found;
            end = found + stop.size();
        }
    }
    stopped_ = end != std::string::npos;
    if (stopped_) {
        say(text.substr(0, start));
        return false;
    }
    std::size_t held = 0;
    for (const std::string& stop : stops_) {
        for (std::size_t length = std::min(stop.size() - 1, text.size()); length > held; --length) {
            if (text.ends_with(std::string_view(stop).substr(0, length))) held = length;
        }
    }
    held_ = text.substr(text.size() - held);
    return say(text.substr(0, text.size() - held));
}

bool Pieces::say(std::string piece) {
    if (piece.empty()) return true;
    text_ += piece;
    return !on_piece_ || on_piece_(piece);
}

}  // namespace vesalius
