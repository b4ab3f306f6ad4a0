// CHECK for the C++ tests: prints what failed and goes on; end main with `return check_result();`.
#pragma once
#include <cstdio>

inline int check_failures = 0;
inline int check_count = 0;

inline bool check(bool holds, const char* condition, const char* file, int line) {
  ++check_count;
  if (!holds) {
    ++check_failures;
    std::printf("%s:%d: failed: %s\n", file, line, condition);
  }
  return holds;
}

#define CHECK(condition) check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)

// A test that checked nothing has failed.
inline int check_result() {
  std::printf("%d of %d checks failed\n", check_failures, check_count);
  return check_failures || !check_count;
}
