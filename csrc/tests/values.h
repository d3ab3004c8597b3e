// Test data: exact-size allocations, so that the address sanitiser sees every access past an end.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "dyvte/common.h"
#include "simd.h"

namespace dyvte::test {

inline std::mt19937& rng() {
  static std::mt19937 engine{20240607};
  return engine;
}

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng()); }

// `shift` elements precede the data, so that its address is not aligned for wide accesses.
template <class T>
class Array {
 public:
  explicit Array(int64_t n = 0, int64_t shift = 0) : n_(n), shift_(shift), data_(new T[n + shift]()) {}
  Array(const Array& other) : Array(other.n_, other.shift_) {
    std::memcpy(data_.get(), other.data_.get(), (n_ + shift_) * sizeof(T));
  }
  Array(std::initializer_list<T> values) : Array(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data_.get());
  }
  T* data() const { return data_.get() + shift_; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return n_; }

 private:
  int64_t n_, shift_;
  std::unique_ptr<T[]> data_;
};

// Normal numbers of one of the three dtypes.
class Values {
 public:
  Values(DType dtype, int64_t n, int64_t shift = 0)
      : dtype_(dtype), n_(n), bytes_(n * element_size(dtype), shift * element_size(dtype)) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) set(i, normal(rng()));
  }
  void* data() const { return bytes_.data(); }
  int64_t size() const { return n_; }
  float get(int64_t i) const {
    using namespace DYVTE_ISA;
    if (dtype_ == DType::f32) return as<float>()[i];
    return dtype_ == DType::f16 ? to_float(as<f16>()[i]) : to_float(as<bf16>()[i]);
  }
  void set(int64_t i, float x) const {
    using namespace DYVTE_ISA;
    if (dtype_ == DType::f32) from_float(x, as<float>() + i);
    if (dtype_ == DType::f16) from_float(x, as<f16>() + i);
    if (dtype_ == DType::bf16) from_float(x, as<bf16>() + i);
  }
  void fill(float x) const {
    for (int64_t i = 0; i < n_; ++i) set(i, x);
  }
  void append_to(std::vector<float>& out) const {
    for (int64_t i = 0; i < n_; ++i) out.push_back(get(i));
  }

 private:
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(bytes_.data());
  }
  DType dtype_;
  int64_t n_;
  Array<char> bytes_;
};

using Ints = Array<int32_t>;

// Running sums of `lengths`, starting at 0.
inline Ints cumulative(const std::vector<int64_t>& lengths) {
  Ints cu(static_cast<int64_t>(lengths.size()) + 1);
  for (size_t i = 0; i < lengths.size(); ++i) cu[i + 1] = cu[i] + static_cast<int32_t>(lengths[i]);
  return cu;
}

// Distinct pages in random order.
inline Ints page_table(int64_t slots, int64_t max_pages) {
  Ints table(slots * max_pages);
  for (int64_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.data(), table.data() + table.size(), rng());
  return table;
}

}  // namespace dyvte::test
