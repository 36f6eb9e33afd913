#include "http/session.hpp"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/bind_handler.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/write.hpp>
#include <future>
#include <iostream>
#include <sstream>

#include "bundle/errors.hpp"
#include "http/access.hpp"
#include "http/page.hpp"

namespace vesalius {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;

namespace {

constexpr std::uint32_t LONGEST_HEADER = 16 << 10;  // bytes
constexpr std::chrono::seconds DRAINING{2};         // for a client to read why it was refused while it is still sending

std::string_view path_of(const http::request<http::string_body>& request) {
    const std::string_view target(request.target().data(), request.target().size());
    return target.substr(0, target.find('?'));
}

std::string_view header(const http::request<http::string_body>& request, http::field field) {
    const auto value = request[field];
    return {value.data(), value.size()};
}

template <typename Message>
void set_headers(Message& message, const Response& response) {
    message.set(http::field::server, "vesalius");
    message.set(http::field::content_type, response.type);
    message.set(http::field::cache_control, "no-store");
    message.set("X-Content-Type-Options", "nosniff");
    message.set("Content-Security-Policy",
                "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'");
    if (response.status == 503) message.set(http::field::retry_after, "1");
    if (response.status == 401) message.set(http::field::www_authenticate, "Bearer");
}

}  // namespace

Session::Session(net::ip::tcp::socket socket, Site& site)
    : site_(site), stream_(std::move(socket)), deadline_(stream_.get_executor()) {
    stream_.expires_never();  // deadline_ is ours, so that a slow client can be told
    site_.sessions.insert(this);
}

Session::~Session() { site_.sessions.erase(this); }

void Session::allow(std::chrono::seconds time) {
    late_ = false;
    deadline_.expires_after(time);
    deadline_.async_wait([weak = weak_from_this()](Error error) {
        const auto self = weak.lock();
        if (error || !self || self->deadline_.expiry() > std::chrono::steady_clock::now()) return;
        self->late_ = true;
        self->stream_.cancel();
    });
}

void Session::read() {
    busy_ = false;
    if (site_.stopping) return close();
    parser_.emplace();
    parser_->header_limit(LONGEST_HEADER);
    parser_->body_limit(site_.options.body);
    allow(site_.options.patience);
    http::async_read_header(stream_, buffer_, *parser_,
                            [self = shared_from_this()](Error error, std::size_t) { self->on_header(error); });
}

void Session::on_header(Error error) {
    start_ = std::chrono::steady_clock::now();
    if (error == http::error::end_of_stream || (late_ && !parser_->got_some())) return close();
    if (error) return on_failure(error);
    busy_ = true;
    allow(site_.options.patience);
    const auto read_body = [self = shared_from_this()](Error failed, std::size_t = 0) {
        if (failed) return self->on_failure(failed);
        http::async_read(self->stream_, self->buffer_, *self->parser_, [self](Error error, std::size_t) { self->on_body(error); });
    };
    if (beast::iequals(parser_->get()[http::field::expect], "100-continue")) {
        static constexpr std::string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
        return net::async_write(stream_, net::buffer(go_on.data(), go_on.size()), read_body);
    }
    read_body({});
}

void Session::on_body(Error error) {
    if (error) return on_failure(error);
    deadline_.cancel();
    answer();
}

// A request that could not be read whole: what is wrong with it is said, and the connection ends.
void Session::on_failure(Error error) {
    deadline_.cancel();
    if (late_) return send(error_response(408, "the request took too long"), false);
    if (error == http::error::body_limit) {
        return send(error_response(413, "the body is larger than " + std::to_string(site_.options.body) + " bytes"), false);
    }
    if (error == http::error::header_limit) return send(error_response(431, "the header is too long"), false);
    if (error.category() == make_error_code(http::error::bad_version).category() && error != http::error::partial_message) {
        return send(error_response(400, "not HTTP: " + error.message()), false);
    }
    close();  // the client went
}

void Session::answer() {
    const bool keep_alive = parser_->get().keep_alive();
    if (auto response = at_once()) return send(std::move(*response), keep_alive);
    ask();
}

std::optional<Response> Session::at_once() {
    const auto& request = parser_->get();
    const std::string_view path = path_of(request);
    const bool get = request.method() == http::verb::get || request.method() == http::verb::head;
    const bool post = request.method() == http::verb::post;
    const auto route = site_.routes.find(path);
    const std::string models = path == "/v1/models" ? site_.model.listed() : "";
    const bool known = path == "/" || path == "/healthz" || path == "/metrics" || !models.empty();
    route_ = route != site_.routes.end() || known ? std::string(path) : "other";

    if (site_.options.token.empty() && site_.loopback && !names_loopback(header(request, http::field::host))) {
        return error_response(421, "this server answers to localhost only");
    }
    if (path == "/" && get) return Response{200, "text/html; charset=utf-8", std::string(PAGE)};
    if (path == "/healthz" && get) return Response{site_.stopping ? 503 : 200, "application/json", site_.model.about() + '\n'};
    if (!site_.options.token.empty() && !carries_token(header(request, http::field::authorization), site_.options.token)) {
        return error_response(401, "expected the header Authorization: Bearer TOKEN");
    }
    if (path == "/metrics" && get) {
        const auto text = site_.metrics.text(site_.queue->waiting(), site_.queue->most(), site_.sessions.size());
        return Response{200, "text/plain; version=0.0.4", text};
    }
    if (!models.empty() && get) return Response{200, "application/json", models + '\n'};
    if (route == site_.routes.end()) {
        return known ? error_response(405, "expected GET") : error_response(404, "there is nothing here");
    }
    if (!post) return error_response(405, "expected POST");
    // A page of another site can send a form or text unasked, JSON only if this server consented, which it does not.
    if (!beast::iequals(request[http::field::content_type].substr(0, 16), "application/json")) {
        return error_response(415, "expected Content-Type: application/json");
    }
    return std::nullopt;
}

void Session::ask() {
    Job job;
    job.route = &site_.routes.find(path_of(parser_->get()))->second;
    const bool keep_alive = parser_->get().keep_alive();
    job.request.body = std::move(parser_->get().body());
    // The guard keeps the server running while this session has nothing to read or write. The session's last holder must be its own
    // thread, so both move there.
    job.done = [self = shared_from_this(), keep_alive,
                guard = net::make_work_guard(stream_.get_executor())](Response response) mutable {
        const auto executor = guard.get_executor();
        const bool streamed = response.stream && self->send_stream(response);
        net::post(executor, [self = std::move(self), guard = std::move(guard), keep_alive, streamed,
                             response = std::move(response)]() mutable {
            response.stream ? self->on_streamed(response.status, streamed) : self->send(std::move(response), keep_alive);
        });
    };
    if (!site_.queue->push(job)) send(error_response(503, "the queue is full"), keep_alive);
}

void Session::send(Response response, bool keep_alive) {
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start_;
    site_.metrics.count(route_.empty() ? "other" : route_, response.status, took.count());
    auto message = std::make_shared<http::response<http::string_body>>(static_cast<http::status>(response.status), 11);
    keep_alive = keep_alive && !site_.stopping;
    set_headers(*message, response);
    message->keep_alive(keep_alive);
    message->body() = std::move(response.body);
    message->prepare_payload();
    if (parser_ && parser_->is_header_done() && parser_->get().method() == http::verb::head) message->body().clear();
    allow(site_.options.patience);
    http::async_write(stream_, *message, [self = shared_from_this(), message, keep_alive](Error error, std::size_t) {
        self->on_sent(error, keep_alive);
    });
}

void Session::on_sent(Error error, bool keep_alive) {
    deadline_.cancel();
    route_.clear();
    if (error) return close();
    if (keep_alive) return read();
    Error none;
    stream_.socket().shutdown(net::ip::tcp::socket::shutdown_send, none);
    allow(DRAINING);
    drain();
}

// Reads and forgets what still comes: closing at once would have the client see a reset instead of its answer.
void Session::drain() {
    buffer_.clear();
    stream_.async_read_some(buffer_.prepare(64 << 10), [self = shared_from_this()](Error error, std::size_t) {
        if (error || self->late_) return self->close();
        self->drain();
    });
}

bool Session::write_and_wait(std::string bytes) {
    std::promise<bool> written;
    net::post(stream_.get_executor(), [&] {
        allow(site_.options.patience);
        net::async_write(stream_, net::buffer(bytes), [&](Error error, std::size_t) {
            deadline_.cancel();
            written.set_value(!error);
        });
    });
    return written.get_future().get();
}

bool Session::send_stream(const Response& response) {
    http::response<http::empty_body> head(static_cast<http::status>(response.status), 11);
    set_headers(head, response);
    head.chunked(true);
    head.keep_alive(false);
    std::ostringstream text;
    text << head.base();
    bool there = write_and_wait(text.str());
    try {
        response.stream([&](std::string_view piece) {
            std::ostringstream chunk;
            chunk << std::hex << piece.size() << "\r\n" << piece << "\r\n";
            there = there && (piece.empty() || write_and_wait(chunk.str()));
            return there;
        });
    } catch (const std::exception& error) {
        std::cerr << route_ << ": " << one_line(error.what(), 1000) << '\n';
        return false;  // without its last chunk the client sees that the answer is not whole
    }
    return there && write_and_wait("0\r\n\r\n");
}

void Session::on_streamed(int status, bool whole) {
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start_;
    site_.metrics.count(route_, status, took.count());
    whole ? on_sent({}, false) : close();
}

void Session::refuse() { send(error_response(503, "too many connections"), false); }

void Session::stop() {
    if (!busy_ && !(parser_ && parser_->got_some())) close();
}

void Session::close() {
    deadline_.cancel();
    Error none;
    stream_.socket().close(none);
}

}  // namespace vesalius
