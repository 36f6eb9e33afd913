#include "http/server.hpp"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/signal_set.hpp>
#include <csignal>
#include <iostream>

#include "bundle/errors.hpp"
#include "http/session.hpp"

namespace vesalius {

namespace net = boost::asio;
using net::ip::tcp;
using Error = boost::system::error_code;

namespace {

net::ip::address address_of(const std::string& host) {
    Error error;
    const auto address = net::ip::make_address(host == "localhost" ? "127.0.0.1" : host, error);
    if (error) throw InputError("--host " + one_line(host, 80) + ": expected an IP address");
    return address;
}

class Listener {
 public:
    Listener(net::io_context& context, Site& site, const tcp::endpoint& endpoint)
        : site_(site), acceptor_(context), retry_(context) {
        try {
            acceptor_.open(endpoint.protocol());
            acceptor_.set_option(net::socket_base::reuse_address(true));
            acceptor_.bind(endpoint);
            acceptor_.listen();
        } catch (const boost::system::system_error& error) {
            throw InputError("--serve " + std::to_string(endpoint.port()) + " on " + endpoint.address().to_string() +
                             ": cannot be listened on: " + error.code().message());
        }
        accept();
    }
    int port() const { return acceptor_.local_endpoint().port(); }
    void close() {
        Error none;
        acceptor_.close(none);
        retry_.cancel();
    }

 private:
    void accept() {
        acceptor_.async_accept([this](Error error, tcp::socket socket) {
            if (error == net::error::operation_aborted || !acceptor_.is_open()) return;
            if (error) return pause();
            const auto session = std::make_shared<Session>(std::move(socket), site_);
            site_.sessions.size() > site_.options.connections ? session->refuse() : session->read();
            accept();
        });
    }
    // Out of file descriptors: some will be given back.
    void pause() {
        retry_.expires_after(std::chrono::milliseconds(100));
        retry_.async_wait([this](Error error) {
            if (!error) accept();
        });
    }

    Site& site_;
    tcp::acceptor acceptor_;
    net::steady_timer retry_;
};

}  // namespace

void ServerOptions::check() const {
    if (!address_of(host).is_loopback() && token.empty()) {
        throw InputError("--host " + host + ": others can reach it, so --token is needed (loopback needs none)");
    }
}

void serve(Model& model, const ServerOptions& options, const std::function<void(int)>& listening) {
    options.check();
    const auto address = address_of(options.host);
    net::io_context context(1);
    Site site{options, model, {}, address.is_loopback(), {}, nullptr, {}, false};
    for (Route& route : model.routes()) site.routes.emplace(route.path, std::move(route));
    Audit audit(options.audit, model.hash());
    Queue queue(options.queue, site.metrics, audit);
    site.queue = &queue;

    Listener listener(context, site, {address, static_cast<unsigned short>(options.port)});
    net::signal_set signals(context, SIGTERM, SIGINT);
    signals.async_wait([&](Error error, int) {
        if (error) return;
        signals.clear();  // a second signal ends it at once
        site.stopping = true;
        listener.close();
        const auto sessions = site.sessions;
        for (Session* const session : sessions) session->stop();
    });
    const std::string host = address.is_v6() ? '[' + address.to_string() + ']' : address.to_string();
    const std::string line = "{\"address\": \"http://" + host + ':' + std::to_string(listener.port()) + "\"}";
    listening ? listening(listener.port()) : void(std::cout << line << std::endl);
    context.run();
}

}  // namespace vesalius
