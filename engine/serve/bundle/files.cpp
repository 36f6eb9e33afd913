#include "bundle/files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "bundle/errors.hpp"

namespace vesalius {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const char* what) {
    throw InputError(path.string() + ": " + what + ": " + std::strerror(errno));
}

class Descriptor {
 public:
    Descriptor(const std::filesystem::path& path, int flags) : number_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {}
    ~Descriptor() {
        if (number_ >= 0) ::close(number_);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int number() const { return number_; }

 private:
    int number_;
};

std::size_t regular_size(const Descriptor& file, const std::filesystem::path& path) {
    struct stat status {};
    if (file.number() < 0 || ::fstat(file.number(), &status) != 0) fail(path, "cannot be read");
    if (!S_ISREG(status.st_mode)) throw InputError(path.string() + ": not a file");
    return static_cast<std::size_t>(status.st_size);
}

}  // namespace

std::string read_file(const std::filesystem::path& path, std::size_t limit) {
    const Descriptor file(path, O_RDONLY | O_NONBLOCK);  // O_NONBLOCK: a pipe is refused rather than waited for
    const std::size_t size = regular_size(file, path);
    if (size > limit) {
        throw InputError(path.string() + ": " + std::to_string(size) + " bytes (expected at most " + std::to_string(limit) + ")");
    }
    std::string content(size, '\0');
    std::size_t done = 0;
    while (done < size) {
        const ssize_t got = ::read(file.number(), content.data() + done, size - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail(path, "cannot be read");
        if (got == 0) break;
        done += static_cast<std::size_t>(got);
    }
    content.resize(done);
    return content;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
    const Descriptor file(path, O_RDONLY | O_NONBLOCK);
    size_ = regular_size(file, path);
    if (size_ == 0) return;
    void* const mapped = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.number(), 0);
    if (mapped == MAP_FAILED) fail(path, "cannot be mapped");
    data_ = static_cast<std::uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) ::munmap(data_, size_);
}

void write_file(const std::filesystem::path& path, Bytes content) {
    const std::filesystem::path temporary = path.string() + '.' + std::to_string(::getpid()) + ".tmp";
    const auto give_up = [&] {
        const int error = errno;
        ::unlink(temporary.c_str());
        errno = error;
        fail(path, "cannot be written");
    };
    {
        const Descriptor file(temporary, O_WRONLY | O_CREAT | O_TRUNC);
        if (file.number() < 0) fail(path, "cannot be written");
        for (std::size_t done = 0; done < content.size();) {
            const ssize_t wrote = ::write(file.number(), content.data() + done, content.size() - done);
            if (wrote < 0 && errno == EINTR) continue;
            if (wrote < 0) give_up();
            done += static_cast<std::size_t>(wrote);
        }
    }
    if (::rename(temporary.c_str(), path.c_str()) != 0) give_up();
}

}  // namespace vesalius
