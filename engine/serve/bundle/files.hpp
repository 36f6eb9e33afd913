// Files read whole or mapped, and written whole: under a temporary name that is then renamed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

namespace vesalius {

using Bytes = std::span<const std::uint8_t>;

inline Bytes as_bytes(std::string_view text) { return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}; }

// The content of a file of at most `limit` bytes. InputError, naming the file, where there is none or it is larger.
std::string read_file(const std::filesystem::path& path, std::size_t limit);

// A file's content as private memory: pages are read when they are touched, and writing to them does not change the file.
class MappedFile {
 public:
    explicit MappedFile(const std::filesystem::path& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }
    Bytes bytes() const { return {data_, size_}; }

 private:
    std::uint8_t* data_ = nullptr;
    std::size_t size_ = 0;
};

// InputError where it cannot be written; then nothing is left of it.
void write_file(const std::filesystem::path& path, Bytes content);

}  // namespace vesalius
