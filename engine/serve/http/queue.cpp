#include "http/queue.hpp"

#include <iostream>

#include "bundle/errors.hpp"

namespace vesalius {

Queue::Queue(std::size_t most, Metrics& metrics, Audit& audit)
    : most_(most), metrics_(metrics), audit_(audit), thread_([this] { work(); }) {}

Queue::~Queue() {
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
    }
    changed_.notify_all();
    thread_.join();
}

bool Queue::push(Job& job) {
    {
        const std::lock_guard lock(mutex_);
        if (jobs_.size() >= most_) return false;
        jobs_.push_back(std::move(job));
    }
    changed_.notify_one();
    return true;
}

std::size_t Queue::waiting() const {
    const std::lock_guard lock(mutex_);
    return jobs_.size();
}

// The first that waits, and others of its route.
std::vector<Job> Queue::next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || !jobs_.empty(); });
    std::vector<Job> taken;
    for (auto job = jobs_.begin(); job != jobs_.end();) {
        const bool full = !taken.empty() && taken.size() >= taken[0].route->most_together;
        if (full) break;
        if (!taken.empty() && job->route != taken[0].route) {
            ++job;
            continue;
        }
        taken.push_back(std::move(*job));
        job = jobs_.erase(job);
    }
    return taken;
}

void Queue::work() {
    for (std::vector<Job> jobs = next(); !jobs.empty(); jobs = next()) answer(std::move(jobs));
}

void Queue::answer(std::vector<Job> jobs) {
    std::vector<Request> requests;
    for (Job& job : jobs) requests.push_back(std::move(job.request));
    std::vector<Response> responses;
    try {
        responses = jobs[0].route->answer(requests);
        if (responses.size() != jobs.size()) throw std::logic_error("not an answer a request");
    } catch (const InputError& error) {
        responses.assign(jobs.size(), error_response(400, error.what()));
    } catch (const std::exception& error) {
        std::cerr << jobs[0].route->path << ": " << one_line(error.what(), 1000) << '\n';
        responses.assign(jobs.size(), error_response(500, "the model failed"));
    }
    metrics_.count_batch(jobs.size());
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        jobs[i].request = std::move(requests[i]);
        audited(jobs[i], std::move(responses[i]));
    }
}

// No answer leaves that the audit does not hold; of a streamed one only the end can be held back.
void Queue::audited(Job& job, Response response) {
    const std::string& route = job.route->path;
    try {
        if (response.stream) {
            response.stream = [this, &job, route, status = response.status, inner = response.stream](const Write& write) {
                std::string output;
                inner([&](std::string_view piece) {
                    output += piece;
                    return write(piece);
                });
                audit_.write(route, job.request, status, output);
            };
        } else {
            audit_.write(route, job.request, response.status, response.body);
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        response = error_response(500, error.what());
    }
    job.done(std::move(response));
}

}  // namespace vesalius
