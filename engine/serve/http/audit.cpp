#include "http/audit.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>

#include "bundle/errors.hpp"
#include "bundle/sha256.hpp"

namespace vesalius {

Audit::Audit(const std::string& file, std::string model) : model_(std::move(model)) {
    if (file.empty()) return;
    file_ = ::open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file_ < 0) throw InputError("--audit " + file + ": cannot be written: " + std::strerror(errno));
}

Audit::~Audit() {
    if (file_ >= 0) ::close(file_);
}

void Audit::write(const std::string& route, const Request& request, int status, const std::string& output) {
    if (file_ < 0) return;
    const std::time_t now = std::time(nullptr);
    std::tm parts{};
    ::gmtime_r(&now, &parts);
    char time[32];
    std::strftime(time, sizeof time, "%Y-%m-%dT%H:%M:%SZ", &parts);
    const std::string line = std::string("{\"time\": \"") + time + "\", \"route\": \"" + route +
                             "\", \"status\": " + std::to_string(status) + ", \"model\": \"" + model_ + "\", \"input\": \"" +
                             sha256(as_bytes(request.body)) + "\", \"output\": \"" + sha256(as_bytes(output)) + "\"}\n";
    if (::write(file_, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
        throw std::runtime_error(std::string("the audit file cannot be written: ") + std::strerror(errno));
    }
}

}  // namespace vesalius
