// The lane engine's blocks of samples for one instruction set: rows into columns and back, and what is asked of whole columns.
#pragma once
#include <math.h>

#include "lanes.h"
#include "pack_impl.h"
#include "vec.h"

namespace {

template <class T>
uint64_t lane_nonzero(const T* column, int64_t width) {
  using M = VecMath<T>;
  uint64_t nonzero = 0;
  for (int64_t j = 0; j < width; ++j)
    nonzero |= static_cast<uint64_t>(nonzero_lanes<T>(M::load(column + j * kLanes<T>)) != 0) << j;
  return nonzero;
}

template <class T>
void lane_columns(const T* from, int64_t sample_stride, int64_t stride, int64_t count, int64_t width, T* column) {
  using M = VecMath<T>;
  constexpr int L = kLanes<T>;
  if (stride == 1) return Transposition<T>().run(from, sample_stride, count, width, column, L);
  for (int64_t j = 0; j < width; ++j, from += stride, column += L) {
    if (sample_stride != 1) {
      for (int64_t i = 0; i < count; ++i) column[i] = from[i * sample_stride];
    } else {
      M::store(column, count == L ? M::load(from) : load_first<T>(from, count));
    }
  }
}

template <class T>
void lane_rows(const T* column, int64_t width, T* rows, int64_t stride) {
  Transposition<T>().run(column, kLanes<T>, width, kLanes<T>, rows, stride);
}

template <class T>
void lane_reach(const T* column, int64_t width, T* largest) {
  using M = VecMath<T>;
  using I = typename M::I;
  I most{};  // magnitudes order like their bit patterns, NaN above infinity
  for (int64_t j = 0; j < width; ++j) {
    const I bits = reinterpret_cast<I>(M::abs(M::load(column + j * kLanes<T>)));
    most = bits > most ? bits : most;
  }
  const I infinity = reinterpret_cast<I>(M::set(static_cast<double>(INFINITY)));
  M::store(largest, reinterpret_cast<typename M::V>(most < infinity ? most : infinity));
}

template <class T>
void lane_scale(T* column, const T* factors, int64_t width) {
  using M = VecMath<T>;
  const typename M::V factor = M::load(factors);
  for (int64_t j = 0; j < width; ++j) M::store(column + j * kLanes<T>, factor * M::load(column + j * kLanes<T>));
}

template <class T>
void lane_move(const T* column, const deq::LaneMove<T>& from, int64_t width, T* to) {
  using M = VecMath<T>;
  constexpr int L = kLanes<T>;
  typename M::I source;
  memcpy(&source, from, sizeof source);
  for (int64_t j = 0; j < width; ++j, column += L, to += L) {
    const typename M::V all = M::load(column);
#ifdef __clang__
    typename M::V taken{};
    for (int i = 0; i < L; ++i) taken[i] = all[source[i] & (L - 1)];
#else
    const typename M::V taken = __builtin_shuffle(all, source);  // takes its indices modulo the lanes
#endif
    M::store(to, M::select(source < 0, M::load(to), taken));
  }
}

}  // namespace
