#include "apps/serving.hpp"

#include "bundle/errors.hpp"
#include "bundle/files.hpp"

namespace vesalius {

void ServingFlags::add_to(CLI::App& app) {
    const std::string group = "Serving";
    app.add_option("--serve", port, "Answer HTTP on this port instead; 0: any that is free. GET / is a page.")
        ->check(CLI::Range(0, 65535))
        ->group(group);
    app.add_option("--host", options.host, "The IP address to listen on. Others than loopback need --token.")
        ->capture_default_str()
        ->group(group);
    app.add_option("--token", options.token, "Demanded of clients, as Authorization: Bearer TOKEN. Better: --token_file.")
        ->group(group);
    app.add_option_function<std::string>(
           "--token_file",
           [this](const std::string& file) {
               std::string token = read_file(file, 4096);
               while (!token.empty() && (token.back() == '\n' || token.back() == '\r' || token.back() == ' ')) token.pop_back();
               if (token.empty()) throw InputError("--token_file " + file + ": empty");
               options.token = token;
           },
           "A file that holds the token.")
        ->group(group);
    app.add_option("--audit", options.audit,
                   "A file that gets a line for each request: time, and hashes of model, input and output.")
        ->group(group);
    app.add_option("--queue", options.queue, "Requests that may wait for the model; more are answered 503.")
        ->check(CLI::Range(1, 100000))
        ->capture_default_str()
        ->group(group);
    app.add_option("--max_body", options.body, "Bytes of a request.")->capture_default_str()->group(group);
    app.add_option_function<int>(
           "--patience", [this](int seconds) { options.patience = std::chrono::seconds(seconds); },
           "Seconds a client has for its header, for its body, and to take its answer.  [30]")
        ->check(CLI::Range(1, 3600))
        ->group(group);
}

void ServingFlags::run(Model& model) {
    options.port = *port;
    serve(model, options);
}

}  // namespace vesalius
