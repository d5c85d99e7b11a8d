// csrc/host/openmp.cpp looks for a library of this name, linked with an OpenMP runtime.
int threads_of_a_region() {
    int threads = 0;
#pragma omp parallel reduction(+ : threads)
    threads += 1;
    return threads;
}
