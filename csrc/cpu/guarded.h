// The border of the C interface, which does not throw.
#pragma once
#include <stdint.h>

#include <exception>

#include "../kernels.h"

namespace deq {

// What `work` returns, a DeqError. All that anything here throws is for want of memory.
template <class Work>
int32_t guarded(const Work& work) noexcept {
  try {
    return work();
  } catch (const std::exception&) {
    return DEQ_NO_MEMORY;
  }
}

}  // namespace deq
