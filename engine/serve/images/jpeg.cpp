// jpeglib.h does not include what it needs, so the order counts.
// clang-format off
#include <cstdio>
#include <jpeglib.h>
#include <jerror.h>
// clang-format on

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <vector>

#include "bundle/errors.hpp"
#include "images/decode.hpp"
#include "images/orientation.hpp"

namespace vesalius {
namespace {

constexpr int MOST_SCANS = 500;  // of a progressive file, each of which costs a pass over all pixels

// libjpeg reports errors by a call that must not return. What the calls after setjmp touch lies here, not on their stack.
struct Reading {
    Reading() {
        header.err = jpeg_std_error(&errors);
        errors.error_exit = [](j_common_ptr common) {
            common->err->format_message(common, self(common).reason);
            std::longjmp(self(common).escape, 1);
        };
        errors.emit_message = [](j_common_ptr common, int level) {
            // Where bytes are missing libjpeg makes grey pixels of them and goes on.
            if (level == -1 && common->err->msg_code == JWRN_JPEG_EOF) common->err->error_exit(common);
        };
        progress.progress_monitor = [](j_common_ptr common) {
            if (reinterpret_cast<j_decompress_ptr>(common)->input_scan_number > MOST_SCANS) {
                std::snprintf(self(common).reason, sizeof self(common).reason, "more than %d scans", MOST_SCANS);
                std::longjmp(self(common).escape, 1);
            }
        };
        header.client_data = this;
    }
    ~Reading() { jpeg_destroy_decompress(&header); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    static Reading& self(j_common_ptr common) { return *static_cast<Reading*>(common->client_data); }

    jpeg_decompress_struct header{};
    jpeg_error_mgr errors{};
    jpeg_progress_mgr progress{};
    std::jmp_buf escape{};
    char reason[JMSG_LENGTH_MAX] = "";
    std::vector<std::uint8_t> values;
};

bool read_header(Reading& reading, Bytes file) {
    if (setjmp(reading.escape)) return false;
    jpeg_create_decompress(&reading.header);
    reading.header.client_data = &reading;
    reading.header.progress = &reading.progress;
    jpeg_mem_src(&reading.header, file.data(), file.size());
    jpeg_save_markers(&reading.header, JPEG_APP0 + 1, 0xFFFF);
    jpeg_read_header(&reading.header, TRUE);
    if (reading.header.num_components == 4) reading.header.out_color_space = JCS_CMYK;
    if (reading.header.num_components == 3) reading.header.out_color_space = JCS_RGB;
    if (reading.header.num_components == 1) reading.header.out_color_space = JCS_GRAYSCALE;
    return true;
}

bool read_pixels(Reading& reading) {
    if (setjmp(reading.escape)) return false;
    jpeg_start_decompress(&reading.header);
    const std::size_t stride = static_cast<std::size_t>(reading.header.output_width) * reading.header.output_components;
    while (reading.header.output_scanline < reading.header.output_height) {
        JSAMPROW row = reading.values.data() + stride * reading.header.output_scanline;
        jpeg_read_scanlines(&reading.header, &row, 1);
    }
    return true;
}

int orientation(const Reading& reading) {
    static constexpr std::string_view exif("Exif\0\0", 6), xmp("http://ns.adobe.com/xap/1.0/\0", 29);
    std::string tags, packet;
    for (auto marker = reading.header.marker_list; marker != nullptr; marker = marker->next) {
        const std::string_view content(reinterpret_cast<const char*>(marker->data), marker->data_length);
        if (content.starts_with(exif)) tags += content.substr(exif.size());  // long ones come in several markers
        if (content.starts_with(xmp)) packet = content.substr(xmp.size());
    }
    const int found = exif_orientation(as_bytes(tags));
    return found != 0 ? found : xmp_orientation(packet);
}

// x * y / 255, rounded.
int product(int x, int y) {
    const int z = x * y + 128;
    return (z + (z >> 8)) >> 8;
}

Image as_rgb(const Reading& reading) {
    Image image(static_cast<int>(reading.header.output_width), static_cast<int>(reading.header.output_height));
    const int channels = reading.header.output_components;
    if (channels == 3) {
        image.values = reading.values;
        return image;
    }
    const std::size_t pixels = static_cast<std::size_t>(image.width) * image.height;
    const bool inverted = reading.header.saw_Adobe_marker;  // Adobe's programs write ink as 255 - ink
    for (std::size_t i = 0; i < pixels; ++i) {
        const std::uint8_t* const pixel = reading.values.data() + i * static_cast<std::size_t>(channels);
        for (std::size_t c = 0; c < 3; ++c) {
            if (channels == 1) {
                image.values[3 * i + c] = pixel[0];
                continue;
            }
            const int ink = inverted ? 255 - pixel[c] : pixel[c], light = inverted ? pixel[3] : 255 - pixel[3];
            image.values[3 * i + c] = static_cast<std::uint8_t>(std::max(0, light - product(ink, light)));
        }
    }
    return image;
}

}  // namespace

Image decode_jpeg(Bytes file, std::size_t most_pixels) {
    Reading reading;
    const auto damaged = [&] { return InputError("truncated or damaged JPEG: " + one_line(reading.reason)); };
    if (!read_header(reading, file)) throw damaged();
    const auto& header = reading.header;
    const std::size_t pixels = static_cast<std::size_t>(header.image_width) * header.image_height;
    if (pixels > most_pixels) {
        throw InputError(std::to_string(header.image_width) + " x " + std::to_string(header.image_height) +
                         " pixels are more than " + std::to_string(most_pixels));
    }
    if (header.num_components != 1 && header.num_components != 3 && header.num_components != 4) {
        throw InputError("a JPEG of " + std::to_string(header.num_components) + " channels");
    }
    reading.values.resize(pixels * static_cast<std::size_t>(header.num_components));
    if (!read_pixels(reading)) throw damaged();
    return turn_upright(as_rgb(reading), orientation(reading));
}

}  // namespace vesalius
