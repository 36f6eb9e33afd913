#include "http/metrics.hpp"

#include <unistd.h>

#include <fstream>
#include <sstream>

namespace vesalius {
namespace {

void gauge(std::ostream& text, const char* name, const char* kind, std::uint64_t value) {
    text << "# TYPE " << name << ' ' << kind << '\n' << name << ' ' << value << '\n';
}

}  // namespace

std::uint64_t resident_bytes() {
    std::ifstream file("/proc/self/statm");
    std::uint64_t all = 0, resident = 0;
    file >> all >> resident;
    return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

void Metrics::count(const std::string& route, int status, double seconds) {
    const std::lock_guard lock(mutex_);
    ++requests_[{route, status}];
    Latency& latency = latencies_[route];
    for (std::size_t i = 0; i < BOUNDS.size(); ++i) latency.within[i] += seconds <= BOUNDS[i] ? 1 : 0;
    ++latency.count;
    latency.seconds += seconds;
}

void Metrics::count_batch(std::size_t requests) {
    const std::lock_guard lock(mutex_);
    ++batches_;
    batched_ += requests;
}

std::string Metrics::text(std::size_t waiting, std::size_t most_waiting, std::size_t connections) const {
    std::ostringstream text;
    const std::lock_guard lock(mutex_);
    text << "# TYPE vesalius_requests_total counter\n";
    for (const auto& [key, count] : requests_) {
        text << "vesalius_requests_total{route=\"" << key.first << "\",status=\"" << key.second << "\"} " << count << '\n';
    }
    text << "# TYPE vesalius_request_seconds histogram\n";
    for (const auto& [route, latency] : latencies_) {
        const std::string label = "{route=\"" + route + '"';
        for (std::size_t i = 0; i < BOUNDS.size(); ++i) {
            text << "vesalius_request_seconds_bucket" << label << ",le=\"" << BOUNDS[i] << "\"} " << latency.within[i] << '\n';
        }
        text << "vesalius_request_seconds_bucket" << label << ",le=\"+Inf\"} " << latency.count << '\n'
             << "vesalius_request_seconds_sum" << label << "} " << latency.seconds << '\n'
             << "vesalius_request_seconds_count" << label << "} " << latency.count << '\n';
    }
    gauge(text, "vesalius_batches_total", "counter", batches_);
    gauge(text, "vesalius_batched_requests_total", "counter", batched_);
    gauge(text, "vesalius_queue_waiting", "gauge", waiting);
    gauge(text, "vesalius_queue_limit", "gauge", most_waiting);
    gauge(text, "vesalius_connections", "gauge", connections);
    gauge(text, "vesalius_resident_bytes", "gauge", resident_bytes());
    return text.str();
}

}  // namespace vesalius
