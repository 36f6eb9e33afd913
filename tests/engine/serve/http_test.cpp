// The queue, the token, and what a name says of a host.
#include <gtest/gtest.h>

#include <condition_variable>
#include <future>
#include <stdexcept>

#include "bundle/errors.hpp"
#include "http/access.hpp"
#include "http/queue.hpp"
#include "images/base64.hpp"

namespace vesalius {
namespace {

TEST(Base64, ComesBackAndIsRefusedWhereItIsNone) {
    for (const std::string& text : std::vector<std::string>{"", "f", "fo", "foo", "foob", std::string("\0\xff\x80", 3)}) {
        EXPECT_EQ(decode_base64(encode_base64(as_bytes(text))), text);
    }
    EXPECT_EQ(encode_base64(as_bytes("fooba")), "Zm9vYmE=");
    for (const char* const text : {"Zg=", "Zg", "Z===", "Zm9v=mE=", "Zm 9", "\xff\xff\xff\xff"}) {
        EXPECT_THROW(decode_base64(text), InputError) << text;
    }
}

TEST(Access, OnlyTheTokenItselfIsTaken) {
    EXPECT_TRUE(carries_token("Bearer abc", "abc"));
    for (const char* const header : {"", "abc", "Bearer ", "Bearer ab", "Bearer abcd", "Bearer abC", "Basic abc"}) {
        EXPECT_FALSE(carries_token(header, "abc")) << header;
    }
}

TEST(Access, OnlyThisMachinesNamesAreLoopback) {
    for (const char* const host : {"localhost", "localhost:80", "127.0.0.1:8080", "[::1]:80", "[::1]"}) {
        EXPECT_TRUE(names_loopback(host)) << host;
    }
    for (const char* const host : {"", "localhost.evil.example", "evil.example:80", "::1", "127.0.0.2"}) {
        EXPECT_FALSE(names_loopback(host)) << host;
    }
}

class QueueTest : public testing::Test {
 protected:
    // Pushes a request; its status and body come later.
    std::future<std::string> ask(Queue& queue, const Route& route, const std::string& body) {
        const auto answer = std::make_shared<std::promise<std::string>>();
        Job job{
            &route, {body}, [answer](Response response) { answer->set_value(std::to_string(response.status) + response.body); }};
        EXPECT_TRUE(queue.push(job));
        return answer->get_future();
    }

    Metrics metrics;
    Audit audit{"", ""};
    std::promise<void> started, go_on;  // of a request "wait"
    std::vector<std::size_t> batches;
    Route route{"/", 3, [this](std::span<const Request> requests) {
                    batches.push_back(requests.size());
                    std::vector<Response> responses;
                    for (const Request& request : requests) {
                        if (request.body == "wait") {
                            started.set_value();
                            go_on.get_future().wait();
                        }
                        if (request.body == "wrong") throw InputError("mend it");
                        if (request.body == "broken") throw std::runtime_error("a secret of the inside");
                        responses.push_back({200, "", request.body});
                    }
                    return responses;
                }};
};

TEST_F(QueueTest, WhatWaitsIsAnsweredTogetherInOrder) {
    Queue queue(8, metrics, audit);
    auto first = ask(queue, route, "wait");
    started.get_future().wait();
    std::vector<std::future<std::string>> others;
    for (const char* const body : {"a", "b", "c", "d"}) others.push_back(ask(queue, route, body));
    go_on.set_value();
    EXPECT_EQ(first.get(), "200wait");
    for (const char* const body : {"a", "b", "c", "d"}) EXPECT_EQ(others[body[0] - 'a'].get(), std::string("200") + body);
    EXPECT_EQ(batches, (std::vector<std::size_t>{1, 3, 1}));
}

TEST_F(QueueTest, NoMoreThanTheLimitWaits) {
    Queue queue(2, metrics, audit);
    auto first = ask(queue, route, "wait");
    started.get_future().wait();
    auto second = ask(queue, route, "a"), third = ask(queue, route, "b");
    Job job{&route, {"c"}, [](Response) { FAIL(); }};
    EXPECT_FALSE(queue.push(job));
    EXPECT_EQ(job.request.body, "c");
    go_on.set_value();
    EXPECT_EQ(third.get(), "200b");
}

TEST_F(QueueTest, WhatWaitsAtTheEndIsAnswered) {
    std::future<std::string> last;
    {
        Queue queue(2, metrics, audit);
        auto first = ask(queue, route, "wait");
        started.get_future().wait();
        last = ask(queue, route, "last");
        go_on.set_value();
    }
    EXPECT_EQ(last.get(), "200last");
}

TEST_F(QueueTest, AnErrorOfTheInsideIsNotTold) {
    Queue queue(2, metrics, audit);
    EXPECT_NE(ask(queue, route, "wrong").get().find("400{\"error\":{\"message\":\"mend it\"}}"), std::string::npos);
    const std::string answer = ask(queue, route, "broken").get();
    EXPECT_TRUE(answer.starts_with("500"));
    EXPECT_EQ(answer.find("secret"), std::string::npos);
    EXPECT_EQ(ask(queue, route, "x").get(), "200x");
}

}  // namespace
}  // namespace vesalius
