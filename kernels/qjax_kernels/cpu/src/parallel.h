// A loop over tasks on XLA's own threads. The caller works too and waits for tasks that have begun, never for a free thread: so it may
// itself be one of the pool's threads.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace qjax_cpu {

template <class F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count, F work) {
  if (count <= 0) return;
  const int64_t helpers = (threads < count ? threads : count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct State {
    explicit State(F f, int64_t n) : work(std::move(f)), count(n) {}
    F work;
    const int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
    void run() {
      int64_t mine = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++mine) work(i);
      if (mine > 0 && done.fetch_add(mine) + mine == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  };
  // A helper that starts late finds no task left, and only then may outlive this call: it holds the state.
  auto state = std::make_shared<State>(std::move(work), count);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->run(); });
  state->run();
  for (int spin = 0; spin < 20000 && state->done.load() < count; ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (state->done.load() < count) {
    std::unique_lock<std::mutex> lock(state->mutex);
    state->finished.wait(lock, [&] { return state->done.load() == count; });
  }
}

}  // namespace qjax_cpu
