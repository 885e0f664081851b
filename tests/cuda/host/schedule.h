// SPDX-License-Identifier: BSD-3-Clause
// Whose turn it is. With a seed of 0 the ready fibers run in the order in which they became so. Otherwise the order is
// drawn: at random, the latest first, or by a priority that a thread, a warp or a block keeps for a while, so that some
// run as far ahead of the others as the barriers let them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace nf::cuda::emulation {

extern bool hostile;

inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Chance {
  uint64_t seed = 0, state = 0, epoch = 0;
  void begin(uint64_t value) {
    seed = value;
    state = mixed(value);
    epoch = 0;
  }
  uint64_t draw() { return mixed(state += 0x9e3779b97f4a7c15u); }
};
inline Chance chance;

template <class Fiber> class Ready {
 public:
  void clear() {
    heap_.clear();
    line_.clear();
    first_ = 0;
  }
  bool empty() const { return hostile ? heap_.empty() : first_ == line_.size(); }
  void add(Fiber* f) {
    if (hostile) {
      heap_.push_back({key(f), f});
      std::push_heap(heap_.begin(), heap_.end(), less);
    } else {
      line_.push_back(f);
    }
  }
  Fiber* take() {
    if (hostile) {
      std::pop_heap(heap_.begin(), heap_.end(), less);
      Fiber* f = heap_.back().second;
      heap_.pop_back();
      return f;
    }
    Fiber* f = line_[first_++];
    if (first_ == line_.size()) {
      line_.clear();
      first_ = 0;
    }
    return f;
  }

 private:
  using Entry = std::pair<uint64_t, Fiber*>;
  static bool less(const Entry& a, const Entry& b) { return a.first < b.first; }
  uint64_t key(const Fiber* f) {
    const uint64_t random = chance.draw();
    if (random % 512 == 0) ++chance.epoch;
    uint64_t who = 0;
    switch (chance.seed % 5) {
      case 0: return random;
      case 1: who = uint64_t(f->block * 32 + f->thread / 32); break;
      case 2: who = uint64_t(f->block); break;
      case 3: who = uint64_t(f->id); break;
      case 4: return ++latest_;
    }
    return (mixed(chance.seed * 0x9e3779b97f4a7c15u + chance.epoch * 8191 + who) & ~0xffffu) | (random & 0xffffu);
  }
  std::vector<Entry> heap_;
  std::vector<Fiber*> line_;
  size_t first_ = 0;
  uint64_t latest_ = 0;
};

}  // namespace nf::cuda::emulation
