// Calls every CPU kernel in every instruction set that runs here: alone, from several threads at once, and
// after a fork. Given the path of a library, it uses the OpenMP runtime linked with that library, else the
// pool.

#include <cstdio>
#include <thread>

#include "host/isa.h"
#include "host/threads.h"
#include "tensor.h"

#if !defined(__SANITIZE_THREAD__)  // it does not support forking a process that has threads
#define FORKS 1
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <dlfcn.h>

namespace ditfast::every_kernel {
namespace {

void check_all() {
    check_rows();
    check_gelu();
    check_gemm();
    check_norm();
    check_attention();
    check_patches();
}

void check_callers() {
    std::thread others[] = {std::thread(check_rows), std::thread(check_gelu), std::thread(check_gemm),
                            std::thread(check_attention)};
    check_patches();
    check_gelu();
    for (std::thread& other : others) other.join();
}

void check_fork() {
#if defined(FORKS)
    const pid_t child = fork();
    if (child == 0) {
        expect(std::string(host::thread_runtime()) == "pool", "a forked process must use the pool");
        check_gelu();
        check_callers();
        std::_Exit(0);
    }
    int status = 0;
    expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
           "a forked process failed");
#endif
}

}  // namespace
}  // namespace ditfast::every_kernel

int main(int count, char** arguments) {
    using namespace ditfast;
    using namespace ditfast::every_kernel;
    expect(count < 2 || dlopen(arguments[1], RTLD_NOW) != nullptr, "cannot load the library");
    const std::string runtime = count < 2 ? "pool" : "openmp";
    expect(host::thread_runtime() == runtime, "threads must run on " + runtime);
    for (const std::string& isa : host::isas()) {
        host::use_isa(isa);
        check_all();
        check_callers();
        check_fork();
        std::printf("%s on %s: ok\n", isa.c_str(), runtime.c_str());
    }
}
