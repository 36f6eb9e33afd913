// Counts of what was asked and how long it took, as Prometheus reads them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace vesalius {

class Metrics {
 public:
    void count(const std::string& route, int status, double seconds);
    // Requests that one call of the model answered.
    void count_batch(std::size_t requests);

    // The text, with what is measured only when it is asked for.
    std::string text(std::size_t waiting, std::size_t most_waiting, std::size_t connections) const;

 private:
    static constexpr std::array<double, 10> BOUNDS{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10};
    struct Latency {
        std::array<std::uint64_t, BOUNDS.size()> within{};  // each bound: so many took no longer
        std::uint64_t count = 0;
        double seconds = 0;
    };

    mutable std::mutex mutex_;
    std::map<std::pair<std::string, int>, std::uint64_t> requests_;
    std::map<std::string, Latency> latencies_;
    std::uint64_t batches_ = 0, batched_ = 0;
};

std::uint64_t resident_bytes();

}  // namespace vesalius
