// One connection: requests are read one after the other, within the limits, and answered in their order.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "http/metrics.hpp"
#include "http/queue.hpp"
#include "http/server.hpp"

namespace vesalius {

// What the sessions of a server share. It is touched by the thread that reads and writes only.
struct Site {
    const ServerOptions& options;
    const Model& model;
    std::map<std::string, Route, std::less<>> routes;
    bool loopback = true;
    Metrics metrics;
    Queue* queue = nullptr;
    std::set<class Session*> sessions;
    bool stopping = false;
};

class Session : public std::enable_shared_from_this<Session> {
 public:
    Session(boost::asio::ip::tcp::socket socket, Site& site);
    ~Session();

    void read();
    // Closes it now if nothing was asked, else after the answer.
    void stop();
    // Answers 503 and closes.
    void refuse();

 private:
    using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
    using Error = boost::beast::error_code;

    void on_header(Error error);
    void on_body(Error error);
    void on_failure(Error error);
    void answer();
    // The answer to a request that needs no model, or that no model shall see; nothing for those of a model.
    std::optional<Response> at_once();
    void ask();
    void send(Response response, bool keep_alive);
    void on_sent(Error error, bool keep_alive);
    // On the model's thread; false where the client did not get all of it.
    bool send_stream(const Response& response);
    void on_streamed(int status, bool whole);
    // Writes on the connection's own thread, and waits for it on this one.
    bool write_and_wait(std::string bytes);
    void drain();
    void close();
    void allow(std::chrono::seconds time);

    Site& site_;
    boost::beast::tcp_stream stream_;
    boost::beast::flat_buffer buffer_;
    boost::asio::steady_timer deadline_;
    std::optional<Parser> parser_;
    std::string route_;
    std::chrono::steady_clock::time_point start_;
    bool busy_ = false, late_ = false;
};

}  // namespace vesalius
