// libFuzzer: any bytes on a connection leave the server standing. It is the real one, in a thread, and each input a connection.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <future>
#include <thread>

#include "http/server.hpp"
#include "segmenter/request.hpp"

namespace {

using namespace vesalius;

class Parsing : public Model {
 public:
    std::vector<Route> routes() override {
        return {
            {"/segment", 4, [](std::span<const Request> requests) {
                 std::vector<Response> responses;
                 for (const Request& request : requests) {
                     responses.push_back({200, "text/plain", std::to_string(SegmentRequest::parse(request.body).prompts.size())});
                 }
                 return responses;
             }}};
    }
    std::string hash() const override { return "none"; }
    std::string about() const override { return "{}"; }
};

int start() {
    auto* const port = new std::promise<int>;  // for as long as the server's thread, which does not end
    std::thread([port] {
        Parsing model;
        ServerOptions options;
        options.body = 1 << 12;
        serve(model, options, [port](int listening) { port->set_value(listening); });
        std::abort();
    }).detach();
    return port->get_future().get();
}

int connect_to(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int connection = ::socket(AF_INET, SOCK_STREAM, 0);
    if (::connect(connection, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) std::abort();
    const linger at_once{1, 0};  // a reset, so that ports do not run out
    ::setsockopt(connection, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    return connection;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const int port = start();
    const int connection = connect_to(port);
    ::send(connection, data, size, MSG_NOSIGNAL);
    ::shutdown(connection, SHUT_WR);
    char answer[4096];
    while (::recv(connection, answer, sizeof answer, 0) > 0) {
    }
    ::close(connection);
    return 0;
}
