// vesalius-tokenize TOKENIZER.JSON: for each line of standard input, a JSON string, a line [tokens, the text they give back].
// A list of tokens instead of a string is only decoded. What tests/engine/serve compares with Hugging Face's `tokenizers`.
#include <iostream>
#include <nlohmann/json.hpp>

#include "bundle/errors.hpp"
#include "tokenizer/tokenizer.hpp"

int main(int count, char** arguments) {
    using nlohmann::json;
    if (count != 2) {
        std::cerr << "vesalius-tokenize: expected one argument, a tokenizer.json\n";
        return 2;
    }
    try {
        std::ios::sync_with_stdio(false);
        const auto tokenizer = vesalius::Tokenizer::read(arguments[1]);
        for (std::string line; std::getline(std::cin, line);) {
            const json given = json::parse(line);
            const auto ids =
                given.is_string() ? tokenizer.encode(given.get<std::string>()) : given.get<std::vector<std::int64_t>>();
            std::cout << json::array({ids, tokenizer.decode(ids)}).dump() << '\n';
        }
    } catch (const vesalius::InputError& error) {
        std::cerr << "vesalius-tokenize: " << error.what() << '\n';
        return 2;
    } catch (const json::exception& error) {
        std::cerr << "vesalius-tokenize: standard input: " << error.what() << '\n';
        return 2;
    }
    return 0;
}
