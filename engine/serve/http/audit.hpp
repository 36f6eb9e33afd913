// One line a request that reached the model: when, which model, and the hashes of what came in and what went out.
#pragma once

#include <string>

#include "http/message.hpp"

namespace vesalius {

class Audit {
 public:
    // "" writes nothing. InputError where the file cannot be appended to.
    Audit(const std::string& file, std::string model);
    ~Audit();
    Audit(const Audit&) = delete;
    Audit& operator=(const Audit&) = delete;

    // std::runtime_error where the line could not be written whole.
    void write(const std::string& route, const Request& request, int status, const std::string& output);

 private:
    std::string model_;
    int file_ = -1;
};

}  // namespace vesalius
