#pragma once

namespace ditfast::host {

// Runs body(data) on `threads` threads including the caller's, or on the caller's alone while another call is using
// the pool. Idle threads sleep.
void run_on_pool(void (*body)(void*), void* data, int threads);

}  // namespace ditfast::host
