// Requests that wait for the model, at most so many, and the one thread that answers them.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "http/audit.hpp"
#include "http/metrics.hpp"
#include "http/model.hpp"

namespace vesalius {

struct Job {
    const Route* route = nullptr;
    Request request;
    std::function<void(Response)> done;  // called once, on the queue's thread
};

class Queue {
 public:
    Queue(std::size_t most, Metrics& metrics, Audit& audit);
    // Answers what waits, then ends.
    ~Queue();
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // False where it is full: the job is left alone.
    bool push(Job& job);
    std::size_t waiting() const;
    std::size_t most() const { return most_; }

 private:
    void work();
    std::vector<Job> next();
    void answer(std::vector<Job> jobs);
    void audited(Job& job, Response response);

    const std::size_t most_;
    Metrics& metrics_;
    Audit& audit_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Job> jobs_;
    bool closed_ = false;
    std::thread thread_;
};

}  // namespace vesalius
