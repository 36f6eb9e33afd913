// The weights of a bundle: a mapped safetensors file, whose tensors are views of the mapping (copies where they lie askew).
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "bundle/files.hpp"
#include "bundle/tensor.hpp"

namespace vesalius {

class Safetensors {
 public:
    // InputError where the header is not that of a whole safetensors file.
    explicit Safetensors(std::shared_ptr<MappedFile> file, const std::string& name);

    // InputError where there is none of that name.
    const Tensor& at(const std::string& tensor) const;
    std::size_t size() const { return tensors_.size(); }

 private:
    std::string name_;
    std::map<std::string, Tensor> tensors_;
};

}  // namespace vesalius
