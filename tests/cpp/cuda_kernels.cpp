// Runs cases under the emulation of CUDA: `cuda_kernels [NAME...]`, all of them without a name. Prints a line for each
// kernel that a case launched: launched CASE FILE THREADS SHARED_BYTES KERNEL. tools/cuda_emulation.py builds it.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_cases.h"
#include "cuda_emulation.h"

namespace diffupose::cases {
namespace {
const char* current = "";
std::mt19937 generator;
}  // namespace

std::vector<Case>& all_cases() {
    static std::vector<Case> all;
    return all;
}

void fail(const std::string& message) {
    std::fprintf(stderr, "FAILED %s: %s\n", current, message.c_str());
    std::exit(1);
}

std::mt19937& random_bits() { return generator; }

void run(const Case& one) {
    current = one.name;
    generator.seed(1);
    emulation::launches().clear();
    one.run();
    for (const auto& [kernel, launched] : emulation::launches()) {
        std::printf("launched %s %s %d %d %s\n", one.name, kernel.second.c_str(), launched.threads,
                    launched.shared_bytes, kernel.first.c_str());
    }
    std::fflush(stdout);
}

}  // namespace diffupose::cases

int main(int argc, char** argv) {
    using namespace diffupose::cases;
    int count = 0;
    for (const Case& one : all_cases()) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], one.name) == 0;
        if (!wanted) continue;
        run(one);
        ++count;
    }
    if (count == 0 || (argc > 1 && count < argc - 1)) fail("no such case");
    std::printf("%d cases passed\n", count);
    return 0;
}
