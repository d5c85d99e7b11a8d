#include "host/norm.h"

#include <cmath>

#include "tensor.h"

namespace ditfast::every_kernel {

void check_norm() {
    constexpr std::int64_t kSizes[] = {0, 1, 33, 140000};
    for (DType dtype : kDTypes) {
        for (bool at_end : {false, true}) {
            for (std::int64_t size : kSizes) {
                Tensor first({at_end, 0}, dtype, 1, 1, size), second({at_end, 0}, dtype, 1, 1, 7);
                first.fill(1);
                second.fill(2);
                const std::vector<host::Span> tensors{{first.data(), size}, {second.data(), 7}};
                const double alone = host::norm(dtype, tensors, 1);
                expect(std::isfinite(alone) && alone > 0, "norm reads what is not there");
                expect(host::norm(dtype, tensors, 3) == alone, "norm depends on the threads");
            }
        }
    }
}

}  // namespace ditfast::every_kernel
