// A segmenter behind the server: POST /segment.
#pragma once

#include <list>
#include <map>

#include "http/model.hpp"
#include "segmenter/request.hpp"
#include "segmenter/segmenter.hpp"

namespace vesalius {

class SegmentService : public Model {
 public:
    // `images`: embeddings that are kept, of those asked for last.
    SegmentService(const Bundle& bundle, std::size_t images);

    std::vector<Route> routes() override;
    std::string hash() const override { return hash_; }
    std::string about() const override { return about_; }

 private:
    struct Asked {
        SegmentRequest request;
        std::size_t place;  // among the responses
    };
    std::vector<Response> answer(std::span<const Request> requests);
    // Requests of one image: its embedding once, then all their prompts together.
    void answer_image(std::vector<Asked>& asked, std::vector<Response>& responses);
    // Of the image that some of the requests brings along, or of one before; nullptr where there is none.
    const Embedding* embedding(const std::string& id, const std::vector<Asked>& asked);

    Segmenter segmenter_;
    std::string hash_, about_;
    std::size_t most_images_;
    std::list<std::pair<std::string, Embedding>> kept_;  // the last used first
};

}  // namespace vesalius
