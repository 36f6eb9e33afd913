// An answer's text in pieces, and what a request of it may say.
#include <gtest/gtest.h>

#include "bundle/errors.hpp"
#include "vlm/completion_request.hpp"
#include "vlm/pieces.hpp"

namespace vesalius {
namespace {

struct Said {
    std::string text, streamed;
    bool stopped = false;
};

// The tokens' text where `stops` end it; no piece ever has to be taken back.
Said say(const std::vector<std::string>& tokens, const std::vector<std::string>& stops) {
    Said said;
    const OnPiece on_piece = [&](const std::string& piece) {
        said.streamed += piece;
        return true;
    };
    Pieces pieces(said.text, on_piece, stops);
    for (const std::string& token : tokens) {
        if (!pieces.add(token)) break;
    }
    pieces.finish();
    said.stopped = pieces.stopped();
    EXPECT_EQ(said.text, said.streamed);
    return said;
}

TEST(Pieces, TheTextEndsBeforeTheFirstStopHoweverTokensDivideIt) {
    const struct {
        std::string text;
        std::vector<std::string> stops;
        std::string expected;
    } cases[] = {
        {"one. two. three.", {"two"}, "one. "},
        {"aaab", {"aab"}, "a"},
        {"abcd", {"abcd", "bc"}, "a"},
        {"xabc", {"bc", "abc"}, "x"},
        {"end", {"end"}, ""},
        {"caf\xc3\xa9 noir", {"\xc3\xa9"}, "caf"},
        {"never en", {"end", "!"}, "never en"},
        {"nothing", {}, "nothing"},
        {"\n\nHuman", {"\n\nHumane", "man"}, "\n\nHu"},
    };
    for (const auto& [text, stops, expected] : cases) {
        for (unsigned cuts = 0; cuts < 1U << (text.size() - 1); cuts += text.size() > 10 ? 37 : 1) {  // each way to divide a short one
            std::vector<std::string> tokens{""};
            for (std::size_t i = 0; i < text.size(); ++i) {
                tokens.back() += text[i];
                if (cuts >> i & 1) tokens.emplace_back();
            }
            const Said said = say(tokens, stops);
            ASSERT_EQ(said.text, expected) << text << " " << cuts;
            ASSERT_EQ(said.stopped, said.text.size() < text.size());
        }
    }
}

TEST(Pieces, OnlyWhatMayBecomeAStopIsHeldBack) {
    std::string text;
    Pieces pieces(text, nullptr, {"###"});
    for (const auto& [token, so_far] : {std::pair{"a#", "a"}, {"b", "a#b"}, {"##", "a#b"}, {"c", "a#b##c"}}) {
        EXPECT_TRUE(pieces.add(token));
        EXPECT_EQ(text, so_far);
    }
}

TEST(CompletionRequest, HasTopPAndStops) {
    const auto of = [](const std::string& more) {
        return CompletionRequest::parse(R"({"messages": [{"role": "user", "content": "?"}])" + more + "}");
    };
    EXPECT_EQ(of("").sampling.top_p, 1);
    EXPECT_TRUE(of(R"(, "stop": null)").stops.empty());
    EXPECT_EQ(of(R"(, "top_p": 0.5)").sampling.top_p, 0.5);
    EXPECT_EQ(of(R"(, "stop": "a")").stops, std::vector<std::string>{"a"});
    EXPECT_EQ(of(R"(, "stop": ["a", "b"])").stops, (std::vector<std::string>{"a", "b"}));
    for (const char* const wrong : {R"("top_p": 1.1)", R"("top_p": "1")", R"("stop": "")", R"("stop": [1])",
                                    R"("stop": ["a", "b", "c", "d", "e"])", R"("stop": {"a": "b"})"}) {
        EXPECT_THROW(of(std::string(", ") + wrong), InputError) << wrong;
    }
}

}  // namespace
}  // namespace vesalius
