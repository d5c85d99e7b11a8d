#pragma once

#include "backward_dkdv.cuh"
#include "backward_dq.cuh"

// Of two adjacent blocks, one computes dk and dv and the other dq of the same head, hence from the same rows:
// what one has read, the other finds in the cache.

namespace ditfast {

template <class T, int D>
DITFAST_KERNEL(32 * kBackwardWarps, 2)
attention_backward(AttentionBackward call, int parts) {
    const RowGroups groups{ptx::block() / 2 % parts, parts, static_cast<int>(call.problem.tokens)};
    if (ptx::block() % 2 == 0) {
        backward_dkdv<T, D>(call, groups);
    } else {
        backward_dq<T, D>(call, groups);
    }
}

}  // namespace ditfast
