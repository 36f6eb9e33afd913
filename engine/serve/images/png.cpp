#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <memory>
#include <vector>

#include "bundle/errors.hpp"
#include "images/decode.hpp"
#include "images/orientation.hpp"
#include "images/scaling.hpp"

namespace vesalius {
namespace {

constexpr png_uint_32 LONGEST_TEXT = 8'000'000;  // bytes of one chunk that is not pixels

[[noreturn]] void keep_reason(png_structp png, png_const_charp reason) {
    auto* const kept = static_cast<char*>(png_get_error_ptr(png));
    std::snprintf(kept, 160, "%s", reason);
    png_longjmp(png, 1);
}

void ignore(png_structp, png_const_charp) {}

// libpng reports errors by longjmp. So what the calls between setjmp and the return touch lies here, not on their stack.
struct Reading {
    explicit Reading(Bytes file) : rest(file) {
        png = png_create_read_struct(PNG_LIBPNG_VER_STRING, reason, keep_reason, ignore);
        info = png == nullptr ? nullptr : png_create_info_struct(png);
        if (info == nullptr) {
            png_destroy_read_struct(&png, nullptr, nullptr);
            throw std::bad_alloc();
        }
        png_set_read_fn(png, this, [](png_structp reader, png_bytep to, std::size_t length) {
            auto& self = *static_cast<Reading*>(png_get_io_ptr(reader));
            if (length > self.rest.size()) png_error(reader, "the file ends early");
            std::memcpy(to, self.rest.data(), length);
            self.rest = self.rest.subspan(length);
        });
        png_set_chunk_malloc_max(png, LONGEST_TEXT);
        png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // pixels are counted below
    }
    ~Reading() { png_destroy_read_struct(&png, &info, nullptr); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    Bytes rest;
    char reason[160] = "";
    png_structp png = nullptr;
    png_infop info = nullptr;
    png_uint_32 width = 0, height = 0;
    int depth = 0, channels = 0;
    std::vector<std::uint8_t> values;
    std::vector<png_bytep> rows;
};

bool read_header(Reading& reading, std::size_t most_pixels) {
    if (setjmp(png_jmpbuf(reading.png))) return false;
    png_read_info(reading.png, reading.info);
    reading.width = png_get_image_width(reading.png, reading.info);
    reading.height = png_get_image_height(reading.png, reading.info);
    if (std::size_t{reading.width} * reading.height > most_pixels) return true;  // before libpng makes room for a row
    reading.depth = png_get_bit_depth(reading.png, reading.info);
    png_set_expand(reading.png);  // palettes to RGB, fewer bits to eight
    png_set_strip_alpha(reading.png);
    if (reading.depth == 16) png_set_swap(reading.png);  // values as this machine has them
    png_set_interlace_handling(reading.png);
    png_read_update_info(reading.png, reading.info);
    reading.channels = png_get_channels(reading.png, reading.info);
    return true;
}

bool read_pixels(Reading& reading) {
    if (setjmp(png_jmpbuf(reading.png))) return false;
    png_read_image(reading.png, reading.rows.data());
    return true;
}

// What follows the pixels may be damaged, and they are whole nevertheless.
void read_end(Reading& reading) {
    if (setjmp(png_jmpbuf(reading.png))) return;
    png_read_end(reading.png, reading.info);
}

int orientation(Reading& reading) {
    if (setjmp(png_jmpbuf(reading.png))) return 0;
    png_uint_32 length = 0;
    png_bytep block = nullptr;
    if (png_get_eXIf_1(reading.png, reading.info, &length, &block) != 0) {
        if (const int found = exif_orientation({block, length}); found != 0) return found;
    }
    png_textp texts = nullptr;
    int count = 0;
    png_get_text(reading.png, reading.info, &texts, &count);
    int found = 0;
    for (int i = 0; i < count; ++i) {
        const std::string_view key = texts[i].key;
        const std::string_view text = texts[i].text == nullptr ? "" : texts[i].text;
        if (key == "Raw profile type exif" && block == nullptr) found = std::max(found, raw_profile_orientation(text));
        if (key == "XML:com.adobe.xmp" && found == 0) found = xmp_orientation(text);
    }
    return found;
}

Image as_rgb(const Reading& reading) {
    Image image(static_cast<int>(reading.width), static_cast<int>(reading.height));
    const std::size_t pixels = static_cast<std::size_t>(reading.width) * reading.height;
    std::vector<std::uint8_t> scaled;
    const std::uint8_t* from = reading.values.data();
    if (reading.depth == 16) {
        std::vector<std::uint16_t> deep(pixels * reading.channels);
        std::memcpy(deep.data(), from, deep.size() * 2);
        scaled = scale_deep(deep);
        from = scaled.data();
    }
    for (std::size_t i = 0; i < pixels; ++i) {
        const std::uint8_t* const pixel = from + i * static_cast<std::size_t>(reading.channels);
        for (std::size_t c = 0; c < 3; ++c) image.values[3 * i + c] = pixel[reading.channels == 3 ? c : 0];
    }
    return image;
}

}  // namespace

Image decode_png(Bytes file, std::size_t most_pixels) {
    Reading reading(file);
    const auto damaged = [&] { return InputError("truncated or damaged PNG: " + one_line(reading.reason)); };
    if (!read_header(reading, most_pixels)) throw damaged();
    if (const std::size_t pixels = static_cast<std::size_t>(reading.width) * reading.height; pixels > most_pixels) {
        throw InputError(std::to_string(reading.width) + " x " + std::to_string(reading.height) + " pixels are more than " +
                         std::to_string(most_pixels));
    }
    const std::size_t stride = png_get_rowbytes(reading.png, reading.info);
    reading.values.resize(stride * reading.height);
    for (png_uint_32 y = 0; y < reading.height; ++y) reading.rows.push_back(reading.values.data() + y * stride);
    if (!read_pixels(reading)) throw damaged();
    read_end(reading);
    return turn_upright(as_rgb(reading), orientation(reading));
}

std::string encode_png(const Mask& mask) {
    png_image header{};
    header.version = PNG_IMAGE_VERSION;
    header.width = static_cast<png_uint_32>(mask.width);
    header.height = static_cast<png_uint_32>(mask.height);
    header.format = PNG_FORMAT_GRAY;
    header.flags = PNG_IMAGE_FLAG_FAST;  // two values compress well at once
    png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(header);
    std::string file(size, '\0');
    if (png_image_write_to_memory(&header, file.data(), &size, 0, mask.values.data(), 0, nullptr) == 0) {
        throw std::runtime_error(std::string("libpng wrote no mask: ") + header.message);
    }
    file.resize(size);
    return file;
}

}  // namespace vesalius
