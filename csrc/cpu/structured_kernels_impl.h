// The table of structured_kernels.h for one instruction set; included after kernels_impl.h.
#pragma once
#include "diagonal_impl.h"
#include "triangular_impl.h"

namespace {

template <class T>
const deq::StructuredKernels<T>* structured_table() {
  static constexpr deq::StructuredKernels<T> kTable = {
      .lanes = kLanes<T>,
      .samples = kTileVectors<T> * kLanes<T>,
      .pack = pack_triangle<T>,
      .substitute = substitute<T>,
      .load = load_tile<T>,
      .store = store_tile<T>,
      .scale = scale_tile<T>,
      .diagonal = diagonal<T>,
      .reduce = reduce<T>,
      .last = last<T>,
  };
  return &kTable;
}

}  // namespace
