// What a kernel body needs of the machine, as a policy. `Device` is the GPU; tests/cpp/emulator.h has another one that runs the
// same bodies on the host, every thread of every block, so that index maps and the order of barriers are tested without a GPU.
#pragma once
#include <stdint.h>

#include "../activations.h"

#ifdef __CUDACC__
#define DEQ_GPU __device__ __forceinline__
#define DEQ_ROLLED _Pragma("unroll 1")
#else
#define DEQ_GPU inline
#define DEQ_ROLLED
#endif

namespace deq {

constexpr int kWarp = 32;

struct alignas(8) Pair {
  uint32_t word[2];
};
struct alignas(16) Quad {
  uint32_t word[4];
};

DEQ_HD float bits_to_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
}

DEQ_HD float bfloat16_to_float(uint32_t low_half) { return bits_to_float(low_half << 16); }

#ifdef __CUDACC__
struct Device {
// Rows of W that an anchor multiplies at once, and reads of a lane that are under way, also in a block of many rows: the compiler
// finds no registers for more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kAnchorRows = 2, kAnchorReads = 1, kTallReads = 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kAnchorRows = 4, kAnchorReads = 4, kTallReads = 1;
#else
  static constexpr int kAnchorRows = 4, kAnchorReads = 4, kTallReads = 4;
#endif
  static DEQ_GPU int thread() { return threadIdx.x; }
  static DEQ_GPU int threads() { return blockDim.x; }
  static DEQ_GPU int block() { return blockIdx.x; }
  static DEQ_GPU int blocks() { return gridDim.x; }
  static DEQ_GPU int row() { return blockIdx.y; }  // of blocks
  static DEQ_GPU int rows() { return gridDim.y; }
  // Blocks that were launched as a cluster see each other's shared memory; one alone before Hopper, or launched as usual.
  static DEQ_GPU int cluster_blocks() { return cluster_register<0>(); }
  static DEQ_GPU int cluster_block() { return cluster_register<1>(); }
  static DEQ_GPU void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
  }
  // Where `at` of this block's shared memory lies in that of another block of the cluster.
  template <class T>
  static DEQ_GPU T* in_block(T* at, int block) {
#if __CUDA_ARCH__ >= 900
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(at), "r"(block));
    return reinterpret_cast<T*>(there);
#else
    (void)block;
    return at;
#endif
  }
  // All threads of the block, which may come from different places of the program: that __syncthreads() forbids.
  static DEQ_GPU void sync() { asm volatile("bar.sync 0, %0;" ::"r"(blockDim.x) : "memory"); }
  static DEQ_GPU void sync_warp() { __syncwarp(); }
  template <class T>
  static DEQ_GPU T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
  template <class T>
  static DEQ_GPU T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
  }
  static DEQ_GPU uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }  // one bit a lane
  static DEQ_GPU bool any(bool value) { return ballot(value) != 0; }
  // Two bfloat16, rounded to nearest even: `low` in the lower half.
  static DEQ_GPU uint32_t pack_bfloat16(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  // d += a b for the 16 x 16 a and the 16 x 8 b of a warp, fragments as PTX lays out mma.m16n8k16.
  static DEQ_GPU void multiply(float (&d)[4], const Quad& a, const Pair& b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
  }
  // What another block wrote: from L2, which all share.
  static DEQ_GPU Pair load(const Pair* at) {
    const uint2 value = __ldcg(reinterpret_cast<const uint2*>(at));
    return Pair{{value.x, value.y}};
  }
  static DEQ_GPU double load(const double* at) { return __ldcg(at); }
  template <class Two>  // doubles, 16 bytes
  static DEQ_GPU Two load(const Two* at) {
    const double2 value = __ldcg(reinterpret_cast<const double2*>(at));
    return Two{value.x, value.y};
  }
  // 16 bytes that this multiprocessor does not need again.
  template <class T>
  static DEQ_GPU T read_once(const float* at) {
    const float4 value = __ldcg(reinterpret_cast<const float4*>(at));
    return T{{value.x, value.y, value.z, value.w}};
  }
  // 16 bytes that another block wrote, to shared memory: there when finish_copies() has returned, for this thread.
  static DEQ_GPU void copy(void* shared, const void* from) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }
  static DEQ_GPU void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
  static DEQ_GPU void keep_least(int64_t* at, int64_t value) {
    atomicMin(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  }
  // Flags between blocks: a release makes all that the block wrote before its last barrier visible to whoever acquires.
  static DEQ_GPU void release(uint32_t* flag, uint32_t value) {
    __threadfence();
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
  }
  // A barrier of 132 blocks by such flags takes 1.6 us on an H200, with relaxed looks and one fence after them 2.1, by
  // cooperative groups 1.0 (deq_cuda_measure).
  static DEQ_GPU uint32_t acquire(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
  }
  static DEQ_GPU void pause() { __nanosleep(20); }

 private:
  template <int RANK>
  static DEQ_GPU int cluster_register() {
#if __CUDA_ARCH__ >= 900
    int value;
    if constexpr (RANK) {
      asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
    } else {
      asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
    }
    return value;
#else
    return RANK ? 0 : 1;
#endif
  }
};
#endif

}  // namespace deq
