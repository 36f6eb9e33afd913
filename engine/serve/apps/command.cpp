#include "apps/command.hpp"

#include <iostream>

#include "bundle/errors.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace vesalius {

int run_command(CLI::App& app, int argc, char** argv, const std::function<void()>& run) {
#ifdef __GLIBC__
    // One heap that is never given back: else each tensor of some megabytes is mapped, cleared page by page and unmapped again.
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, -1);
#endif
    try {
        app.parse(argc, argv);
        run();
        return 0;
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) return app.exit(error);  // --help
        std::cerr << app.get_name() << ": " << one_line(error.what(), 1000) << "; --help lists the flags\n";
        return 2;
    } catch (const InputError& error) {
        std::cerr << app.get_name() << ": " << one_line(error.what(), 1000) << '\n';
        return 2;
    } catch (const std::exception& error) {
        std::cerr << app.get_name() << ": " << one_line(error.what(), 1000) << '\n';
        return 1;
    }
}

}  // namespace vesalius
