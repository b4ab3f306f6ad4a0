// Runs a kernel body on the host: every thread of every block is a fiber, all blocks are resident together, whoever can run next
// is drawn at random, and now and then a block or a warp is held up while the others go on. What the body needs of the GPU
// (csrc/cuda/device.h) has its documented meaning here: barriers wait for all threads, warp operations for all lanes, the tensor
// core multiplies what the fragments hold. Fresh shared memory is NaN.
//
// It finds wrong index maps, missing barriers (another seed gives another answer) and deadlocks, but no reordering of memory.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cuda/device.h"

namespace deq {

class Emulator {
 public:
  static constexpr int kAnchorRows = 4, kAnchorReads = 4, kTallReads = 4;
  // Runs `body(shared memory of the block)` by `threads` threads each in blocks x rows blocks, clusters of so many.
  static void launch(int blocks, int rows, int threads, size_t shared_bytes, unsigned seed,
                     const std::function<void(char*)>& body, int cluster = 1) {
    Emulator machine(blocks, rows, threads, shared_bytes, seed, body, cluster);
    now_ = &machine;
    machine.run();
    now_ = nullptr;
  }

  static int thread() { return now_->current_->thread; }
  static int threads() { return now_->threads_; }
  static int block() { return now_->current_->block->index; }
  static int blocks() { return now_->blocks_; }
  static int row() { return now_->current_->block->row; }
  static int rows() { return static_cast<int>(now_->grid_.size()) / now_->blocks_; }
  static int cluster_blocks() { return now_->cluster_; }
  static int cluster_block() { return block() % now_->cluster_; }
  static void sync_cluster() { now_->wait(now_->clusters_[now_->cluster_index()], now_->cluster_ * now_->threads_); }
  template <class T>
  static T* in_block(T* at, int block) {
    const Block& other = now_->grid_[now_->cluster_index() * now_->cluster_ + block];
    return reinterpret_cast<T*>(other.aligned + (reinterpret_cast<char*>(at) - now_->current_->block->aligned));
  }
  static void sync() { now_->wait(now_->current_->block->barrier, now_->threads_); }
  static void sync_warp() { now_->wait(now_->warp().barrier, kWarp); }
  template <class T>
  static T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) <= sizeof(Lane));
    Lane* lanes = now_->exchange(&value, sizeof value);
    T other;
    memcpy(&other, &lanes[(thread() % kWarp) ^ mask], sizeof other);
    return other;
  }
  template <class T>
  static T shuffle(T value, int lane) {
    static_assert(sizeof(T) <= sizeof(Lane));
    Lane* lanes = now_->exchange(&value, sizeof value);
    T other;
    memcpy(&other, &lanes[lane], sizeof other);
    return other;
  }
  static uint32_t ballot(bool value) {
    Lane* lanes = now_->exchange(&value, sizeof value);
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarp; ++lane) bits |= static_cast<uint32_t>(*reinterpret_cast<bool*>(&lanes[lane])) << lane;
    return bits;
  }
  static bool any(bool value) { return ballot(value) != 0; }
  template <class T>
  static T read_once(const float* at) {
    return *reinterpret_cast<const T*>(at);
  }
  static void copy(void* shared, const void* from) { memcpy(shared, from, 16); }
  static void finish_copies() {}
  static uint32_t pack_bfloat16(float low, float high) { return round(low) | round(high) << 16; }
  static void multiply(float (&d)[4], const Quad& a, const Pair& b) {
    const Lane mine{{a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1]}};
    const Lane* lanes = now_->exchange(&mine, sizeof mine);
    const int lane = thread() % kWarp;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        const Lane &from_a = lanes[row % 8 * 4 + k % 8 / 2], &from_b = lanes[column * 4 + k % 8 / 2];
        const uint32_t word_a = from_a.word[row / 8 + 2 * (k / 8)], word_b = from_b.word[4 + k / 8];
        sum += static_cast<double>(half(word_a, k % 2)) * half(word_b, k % 2);
      }
      d[e] += static_cast<float>(sum);
    }
  }
  template <class T>
  static T load(const T* at) {
    return *at;
  }
  static void keep_least(int64_t* at, int64_t value) {
    if (static_cast<uint64_t>(value) < static_cast<uint64_t>(*at)) *at = value;
  }
  static void release(uint32_t* flag, uint32_t value) { *flag = value; }
  static uint32_t acquire(const uint32_t* flag) {
    const uint32_t value = *flag;
    now_->yield();
    return value;
  }
  static void pause() { now_->yield(); }

 private:
  struct Lane {
    uint32_t word[6];
  };
  struct Barrier {
    int arrived = 0;
    int64_t passed = 0;
  };
  struct Warp {
    Barrier barrier;
    int64_t held_until = 0;
    int parity[kWarp] = {};
    Lane lanes[2][kWarp];
  };
  struct Block {
    int index, row;
    Barrier barrier;
    int64_t held_until = 0;
    std::vector<Warp> warps;
    std::vector<char> shared;
    char* aligned;
  };
  struct Fiber {
    ucontext_t context;  // to begin in; later switches need no signal mask, which costs a system call each
    jmp_buf at;
    bool begun = false;
    std::unique_ptr<char[]> stack;
    Block* block;
    int thread;
    const Barrier* waits_for = nullptr;
    int64_t until = 0;
    bool done = false;
  };
  static constexpr size_t kStack = 64 << 10;
  static constexpr int kBlockHold = 40, kWarpHold = 8;  // scheduling rounds, at most

  Emulator(int blocks, int rows, int threads, size_t shared_bytes, unsigned seed, const std::function<void(char*)>& body,
           int cluster)
      : blocks_(blocks),
        threads_(threads),
        cluster_(cluster),
        random_(seed),
        body_(body),
        grid_(blocks * rows),
        clusters_(blocks * rows / cluster),
        fibers_(grid_.size() * threads) {
    for (size_t i = 0; i < grid_.size(); ++i) {
      Block& block = grid_[i];
      block.index = static_cast<int>(i % blocks), block.row = static_cast<int>(i / blocks);
      block.warps.resize((threads + kWarp - 1) / kWarp);
      block.shared.assign(shared_bytes + 16, static_cast<char>(0xff));
      block.aligned = block.shared.data() + (16 - reinterpret_cast<uintptr_t>(block.shared.data()) % 16) % 16;
    }
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.block = &grid_[i / threads];
      fiber.thread = static_cast<int>(i % threads);
      fiber.stack.reset(new char[kStack]);  // left as it is: clearing it took most of the time
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
    }
  }

  static void enter() {
    now_->body_(now_->current_->block->aligned);
    now_->current_->done = true;
    _longjmp(now_->at_, 1);
  }
  void resume(Fiber& fiber) {
    if (_setjmp(at_)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }
  void leave() {
    if (!_setjmp(current_->at)) _longjmp(at_, 1);
  }

  void run() {
    std::vector<Fiber*> waiting;
    for (Fiber& fiber : fibers_) waiting.push_back(&fiber);
    int64_t idle_rounds = 0;
    for (int64_t round = 0; !waiting.empty(); ++round) {
      std::shuffle(waiting.begin(), waiting.end(), random_);
      for (Block& block : grid_) {
        hold_up(block.held_until, round, kBlockHold);
        for (Warp& warp : block.warps) hold_up(warp.held_until, round, kWarpHold);
      }
      bool moved = false;
      size_t left = 0;
      for (Fiber* fiber : waiting) {
        const bool is_held = round < std::max(fiber->block->held_until, fiber->block->warps[fiber->thread / kWarp].held_until);
        if (!is_held && (!fiber->waits_for || fiber->waits_for->passed >= fiber->until)) {
          fiber->waits_for = nullptr;
          current_ = fiber;
          yielded_ = false;
          resume(*fiber);
          moved |= !yielded_;
        }
        if (!fiber->done) waiting[left++] = fiber;
      }
      waiting.resize(left);
      idle_rounds = moved ? 0 : idle_rounds + 1;
      if (idle_rounds > 100 * kBlockHold) {
        fprintf(stderr, "emulator: deadlock, %zu threads wait for each other\n", left);
        for (size_t i = 0; i < left && i < 8; ++i)
          fprintf(stderr, "  block %d thread %d\n", waiting[i]->block->index, waiting[i]->thread);
        abort();
      }
    }
  }

  void hold_up(int64_t& until, int64_t round, int most) {
    if (round >= until && random_() % (2 * most) == 0) until = round + random_() % most;
  }

  void wait(Barrier& barrier, int count) {
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.passed;
      return;
    }
    current_->waits_for = &barrier;
    current_->until = barrier.passed + 1;
    leave();
  }
  void yield() {
    yielded_ = true;
    leave();
  }
  size_t cluster_index() const { return (current_->block - grid_.data()) / cluster_; }
  Warp& warp() { return current_->block->warps[current_->thread / kWarp]; }
  // Every lane's value, once all lanes have brought theirs. A lane is never two exchanges ahead of another.
  Lane* exchange(const void* value, size_t bytes) {
    Warp& w = warp();
    const int lane = current_->thread % kWarp, parity = w.parity[lane];
    w.parity[lane] = 1 - parity;
    memcpy(&w.lanes[parity][lane], value, bytes);
    wait(w.barrier, kWarp);
    return w.lanes[parity];
  }
  static float half(uint32_t word, int which) { return bfloat16_to_float(which ? word >> 16 : word & 0xffff); }
  static uint32_t round(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }

  static inline Emulator* now_ = nullptr;
  const int blocks_, threads_, cluster_;
  std::minstd_rand random_;
  const std::function<void(char*)>& body_;
  std::vector<Block> grid_;
  std::vector<Barrier> clusters_;
  std::vector<Fiber> fibers_;
  jmp_buf at_;  // the scheduler
  Fiber* current_ = nullptr;
  bool yielded_ = false;
};

}  // namespace deq
