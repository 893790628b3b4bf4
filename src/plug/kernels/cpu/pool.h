// Threads for the products of a decoding step.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace plug {

// Threads that take chunks of work one by one. A step hands out work every few dozen microseconds, so they spin for a
// moment before they sleep. Nobody waits for a thread that has taken nothing: a core that is busy elsewhere costs its
// share and no more.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    stop_ = true;
    rounds_.fetch_add(1);
    rounds_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  // act(0) ... act(chunks - 1), in any order, by any thread; from one thread at a time.
  void run(int64_t chunks, const std::function<void(int64_t)>& act) {
    if (workers_.empty() || chunks == 1) {
      for (int64_t i = 0; i < chunks; ++i) act(i);
      return;
    }
    act_ = &act;
    done_.store(0, std::memory_order_relaxed);
    // Number of chunks and next chunk in one word, so that who comes late cannot mix two rounds up.
    tickets_.store(static_cast<uint64_t>(chunks) << 32, std::memory_order_release);
    rounds_.fetch_add(1);
    if (sleepers_.load()) rounds_.notify_all();
    while (take()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; ++spins)
      if (spins > SPINS) std::this_thread::yield();
  }

 private:
  static constexpr int SPINS = 20000;  // about 0.1 ms

  bool take() {
    if (exhausted(tickets_.load(std::memory_order_acquire))) return false;
    const uint64_t ticket = tickets_.fetch_add(1, std::memory_order_acq_rel);
    if (exhausted(ticket)) return false;
    (*act_)(static_cast<int64_t>(ticket & 0xffffffff));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }
  static bool exhausted(uint64_t ticket) { return (ticket & 0xffffffff) >= ticket >> 32; }

  void work() {
    for (uint32_t seen = 0;;) {
      uint32_t now;
      for (int spins = 0; (now = rounds_.load()) == seen; ++spins) {
        if (spins < SPINS) continue;
        sleepers_.fetch_add(1);
        rounds_.wait(seen);
        sleepers_.fetch_sub(1);
      }
      seen = now;
      if (stop_) return;
      while (take()) {
      }
    }
  }

  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* act_ = nullptr;
  std::atomic<uint64_t> tickets_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<uint32_t> rounds_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace plug
