// Threads that share steps: every piece of every step is done once, and before the next step begins.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/segments.h"
#include "cpu/team.h"
#include "cpu/threads.h"

namespace {

// A team whose members may come late, and be held up in the middle of a piece.
void every_piece_once(int pieces, int members, int steps, bool held_up) {
  while (deq::LostCore::is_recent()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  deq::Team team(pieces, members);
  std::vector<int> done(pieces, 0);
  std::vector<std::atomic<int64_t>> by(members);
  std::vector<std::thread> helpers;
  for (int member = 1; member < members; ++member)
    helpers.emplace_back([&, member] {
      if (held_up) std::this_thread::sleep_for(std::chrono::milliseconds(member));
      team.help(member);
    });
  std::atomic<bool> in_order{true}, helped{members == 1};
  for (int step = 0; step < steps; ++step) {
    team.share([&](int piece, int member) {
      if (held_up && member > 0 && (step + piece) % 17 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      if (done[piece]++ != step) in_order = false;
      by[member].fetch_add(1, std::memory_order_relaxed);
      if (member > 0) helped = true;
      // The leader is held up until others have come.
      for (int i = 0; i < 2000 && step == 0 && !helped; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    for (int piece = 0; piece < pieces; ++piece)
      if (done[piece] != step + 1) in_order = false;
    if (held_up && step % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));  // long enough to fall asleep
  }
  team.close();
  for (std::thread& helper : helpers) helper.join();
  CHECK(in_order);
  CHECK(helped);
  int64_t all = 0;
  for (auto& count : by) all += count;
  CHECK(all == static_cast<int64_t>(pieces) * steps);
}

void nobody_comes() {
  deq::Team team(4, 3);
  int done = 0;
  team.share([&](int, int member) { done += member == 0; });
  CHECK(done == 4);
  team.close();
  team.help(1);  // and comes when all is over
}

void segments() {
  for (int64_t width : {1, 255, 511, 512, 513, 700, 1100, 2048, 5000, 100000}) {
    const int64_t padded = (width + 15) / 16 * 16;
    const deq::Segments cut(width, padded);
    CHECK(cut.count >= 1 && cut.count <= deq::Segments::kMost && cut.start[0] == 0 && cut.start[cut.count] == padded);
    CHECK((width >= 512) == (cut.count > 1));
    for (int i = 0; i < cut.count; ++i) {
      CHECK(cut.start[i] < cut.start[i + 1] && cut.start[i] % deq::Segments::kMultiple == 0);
      if (cut.count > 1) CHECK(cut.start[i + 1] - cut.start[i] >= width / cut.count - deq::Segments::kMultiple);
    }
  }
}

// How many threads a problem is worth, and that it is worth none beside the caller's after a core was lost.
void divisions() {
  using deq::Division;
  while (deq::LostCore::is_recent()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  auto division = [](int64_t weights, int64_t batch, int64_t width, int threads, int segments = 1) {
    DeqProblem p{};
    p.weights = weights, p.batch = batch, p.width = width, p.threads = threads;
    return deq::divide(p, segments);
  };
  CHECK(division(1, 256, 256, 1).threads == 1 && division(1, 0, 256, 8).threads == 0);
  CHECK(division(1, 5, 64, 2).threads == 1);     // 4e4 flops
  CHECK(division(1, 20, 100, 2).threads == 2);   // 4e5
  CHECK(division(1, 20, 100, 16).threads == 4);  // a thread for every 1e5
  CHECK(division(1, 20, 100, 16).is_small && !division(1, 256, 128, 16).is_small);
  CHECK(division(1, 256, 128, 16).threads == 16 && division(1, 3, 1000, 16).threads == 3);
  CHECK(division(8, 64, 32, 4).kind == Division::kMatrices && division(3, 64, 32, 4).kind == Division::kSamples);
  CHECK(division(1, 2, 1024, 4, 8).kind == Division::kColumns && division(1, 2, 1024, 4, 8).threads == 4);
  deq::LostCore::report(1000000, 1000000);
  CHECK(deq::LostCore::is_recent());
  CHECK(division(1, 20, 100, 16).threads == 1 && division(8, 64, 32, 4).threads == 1);
  CHECK(division(1, 256, 128, 16).threads == 16);  // gains more than a lost core costs
  CHECK(division(1, 2, 1024, 4, 8).threads == 1);
}

// Sleeping is what a lost core looks like; work is not. It is looked for after a region that took long.
void attendance() {
  auto wait = [] {
    while (deq::LostCore::is_recent()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  };
  auto sleep = [] {
    const deq::Attendance sleeping(deq::clock_ns());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  wait();
  {
    const deq::Attendance working(deq::clock_ns());
    const deq::Attendance late(deq::clock_ns() - 500000);
  }
  CHECK(!deq::LostCore::is_recent());
  {
    const deq::Attendance very_late(deq::clock_ns() - 5000000);
  }
  CHECK(deq::LostCore::is_recent());
  wait();
  {
    const deq::Attendance working(deq::clock_ns());
  }
  sleep();
  CHECK(!deq::LostCore::is_recent());
  sleep();
  CHECK(deq::LostCore::is_recent());
  // Unless another process took the core just then.
  bool worked = false;
  for (int attempt = 0; attempt < 20 && !worked; ++attempt) {
    wait();
    for (int i = 0; i < 2; ++i) {
      const deq::Attendance working(deq::clock_ns());
      for (const int64_t end = deq::clock_ns() + 300000; deq::clock_ns() < end;) {
      }
    }
    worked = !deq::LostCore::is_recent();
  }
  CHECK(worked);
}

}  // namespace

int main() {
  for (int members : {1, 2, 3, 5})
    for (int pieces : {5, 8, 16})
      for (bool held_up : {false, true}) every_piece_once(pieces, members, held_up ? 300 : 5000, held_up);
  nobody_comes();
  segments();
  divisions();
  attendance();
  return check_result();
}
