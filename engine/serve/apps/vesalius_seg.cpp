// vesalius-seg: masks for boxes and points in images, by a bundle of the SAM family: of one image, or as a server.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/command.hpp"
#include "apps/serving.hpp"
#include "bundle/errors.hpp"
#include "bundle/package.hpp"
#include "images/decode.hpp"
#include "segmenter/segmenter.hpp"
#include "segmenter/service.hpp"

namespace {

struct Arguments {
    std::string bundle, image, box, points, out;
    int threads = 0;
    std::size_t images = 16;
    vesalius::ServingFlags serving;
};

void check_output(const Arguments& args) {
    const std::filesystem::path out(args.out);
    if (out.extension() != ".png") throw vesalius::InputError("--out " + args.out + ": expected a name that ends in .png");
    if (std::filesystem::is_directory(out)) throw vesalius::InputError("--out " + args.out + ": a folder (expected a file)");
    std::error_code none;
    if (std::filesystem::equivalent(out, args.image, none)) throw vesalius::InputError("--out " + args.out + ": it is --image");
    if (out.has_parent_path() && !std::filesystem::is_directory(out.parent_path())) {
        throw vesalius::InputError("--out " + args.out + ": no such folder");
    }
}

void segment(const Arguments& args) {
    using namespace vesalius;
    if (args.image.empty()) throw InputError("--image is missing");
    if (args.out.empty()) throw InputError("--out is missing");
    check_output(args);
    Prompt prompt;
    if (!args.box.empty()) prompt.box = parse_box(args.box);
    if (!args.points.empty()) prompt.points = parse_points(args.points);
    const Image image = open_image(args.image);
    try {
        check_prompt(prompt, image.width, image.height);
    } catch (const InputError& error) {
        throw InputError(args.image + ": " + error.what());
    }
    Segmenter segmenter(Bundle(args.bundle, "segmenter"));

    const auto start = std::chrono::steady_clock::now();
    Segmentation result;
    segmenter.segment(segmenter.embed(image), {prompt}, [&](std::size_t, Segmentation made) { result = std::move(made); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

    write_file(args.out, as_bytes(encode_png(result.mask)));
    const auto area = std::ranges::count(result.mask.values, 255);
    const nlohmann::ordered_json headline{
        {"mask", args.out}, {"area", area}, {"predicted_iou", result.iou}, {"seconds", seconds.count()}};
    std::cout << headline.dump() << '\n';
}

void run(Arguments& args) {
    using namespace vesalius;
    if (args.threads > 0) set_threads(args.threads);
    if (!args.serving.wanted()) return segment(args);
    args.serving.options.check();
    SegmentService service(Bundle(args.bundle, "segmenter"), args.images);
    args.serving.run(service);
}

}  // namespace

int main(int argc, char** argv) {
    Arguments args;
    CLI::App app("A mask for a box or points in an image. The last line is JSON: mask, area (pixels), predicted_iou, seconds.",
                 "vesalius-seg");
    app.add_option("BUNDLE", args.bundle, "A folder that python -m recipes.export wrote.")->required();
    app.add_option("--image", args.image, "A PNG or JPEG file.");
    app.add_option("--box", args.box, "x1,y1,x2,y2 in pixels of the image.");
    app.add_option("--points", args.points, "x,y,label;x,y,label in pixels; label 1: inside what is meant, 0: outside.");
    app.add_option("--out", args.out, "The mask to write: a PNG of 0 and 255 in the image's own size.");
    app.add_option("--threads", args.threads, "Threads of the model. 0: as torch chooses (OMP_NUM_THREADS).")
        ->check(CLI::Range(0, 1024));
    app.add_option("--images", args.images, "Embeddings that the server keeps, of the images asked for last.")
        ->check(CLI::Range(1, 10000))
        ->capture_default_str()
        ->group("Serving");
    args.serving.add_to(app);
    return vesalius::run_command(app, argc, argv, [&] { run(args); });
}
