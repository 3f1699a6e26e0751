// A packed weight that owns its arrays.
#pragma once
#include <memory>
#include <new>
#include <vector>

#include "many.h"
#include "prunella.h"

// Arrays that begin with a cache line: a vector of a block of weights then never lies in two.
template <class T>
struct Aligned {
  typedef T value_type;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(prunella::kAlign))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(prunella::kAlign)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

struct prunella_window;

struct prunella_many {
  prunella::ManyWeight weight{};
  std::vector<int32_t> band_start;
  std::vector<int64_t> group_start, band_nnz;
  std::vector<prunella::ManyGroup> group;
  std::vector<uint16_t, Aligned<uint16_t>> index;
  std::vector<float, Aligned<float>> value;
  mutable std::shared_ptr<const prunella_window> window;  // of the last image; read and replaced atomically

  void seal();
};
