#include "trace.h"

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <mutex>
#include <vector>

#include "../kernels.h"

#if defined(DEQ_HAVE_NVTX)
#include <nvtx3/nvToolsExt.h>
#endif

namespace deq {
namespace {

constexpr const char* kNames[] = {"pack", "step", "anchor", "Anderson"};
constexpr size_t kMostSpans = 1 << 20;

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);  // that of Python's time.perf_counter_ns
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

std::mutex& guard() {
  static std::mutex mutex;
  return mutex;
}

std::vector<DeqSpan>& spans() {
  static std::vector<DeqSpan> all;
  return all;
}

std::atomic<bool> records{false};
thread_local std::vector<DeqSpan> running;

#if defined(DEQ_HAVE_NVTX)
// Registered once; null where no tool is attached, and then nothing is said.
nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("deq");
  return handle;
}

void push(Span span, int64_t payload) {
  static const nvtxStringHandle_t names[] = {
      nvtxDomainRegisterStringA(domain(), kNames[0]), nvtxDomainRegisterStringA(domain(), kNames[1]),
      nvtxDomainRegisterStringA(domain(), kNames[2]), nvtxDomainRegisterStringA(domain(), kNames[3])};
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
  attributes.message.registered = names[static_cast<int>(span)];
  attributes.payloadType = NVTX_PAYLOAD_TYPE_INT64;
  attributes.payload.llValue = payload;
  nvtxDomainRangePushEx(domain(), &attributes);
}

void pop() { nvtxDomainRangePop(domain()); }
#else
void* domain() { return nullptr; }
void push(Span, int64_t) {}
void pop() {}
#endif

}  // namespace

void Trace::begin(Span span, int64_t payload) {
  running.push_back(DeqSpan{static_cast<int32_t>(span), static_cast<int32_t>(syscall(SYS_gettid)), payload, now(), 0});
  if (domain()) push(span, payload);
}

void Trace::end() {
  if (domain()) pop();
  DeqSpan span = running.back();
  running.pop_back();
  if (!records.load(std::memory_order_relaxed)) return;
  span.end = now();
  const std::lock_guard<std::mutex> lock(guard());
  if (spans().size() < kMostSpans) spans().push_back(span);
}

struct TraceControl {
  static void set() { Trace::on_.store(records.load() || domain() != nullptr); }
};

}  // namespace deq

void deq_trace_start(void) {
  {
    const std::lock_guard<std::mutex> lock(deq::guard());
    deq::spans().clear();
  }
  deq::records.store(true);
  deq::TraceControl::set();
}

int64_t deq_trace_stop(void) {
  deq::records.store(false);
  deq::TraceControl::set();
  const std::lock_guard<std::mutex> lock(deq::guard());
  return static_cast<int64_t>(deq::spans().size());
}

int64_t deq_trace_read(DeqSpan* out, int64_t most) {
  const std::lock_guard<std::mutex> lock(deq::guard());
  const int64_t count = static_cast<int64_t>(deq::spans().size()) < most ? static_cast<int64_t>(deq::spans().size()) : most;
  for (int64_t i = 0; i < count; ++i) out[i] = deq::spans()[i];
  return count;
}

int32_t deq_trace_attach(void) {
  deq::TraceControl::set();
  return deq::domain() != nullptr;
}
