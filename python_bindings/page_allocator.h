// Hands out page numbers of a K/V pool. Host-side bookkeeping only; it never touches the pages.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace dyvte {

class OutOfPages : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class PageAllocator {
 public:
  explicit PageAllocator(int64_t n_pages) {
    if (n_pages < 0) throw std::invalid_argument("n_pages must not be negative, got " + std::to_string(n_pages));
    used_.assign(static_cast<size_t>(n_pages), false);
    free_count_ = n_pages;
  }

  // The n lowest free pages, or OutOfPages and no change.
  std::vector<int64_t> alloc(int64_t n) {
    if (n < 0) throw std::invalid_argument("n must not be negative, got " + std::to_string(n));
    if (n > free_count_) {
      throw OutOfPages("asked for " + std::to_string(n) + " pages, " + std::to_string(free_count_) + " of " +
                       std::to_string(used_.size()) + " are free");
    }
    std::vector<int64_t> pages;
    pages.reserve(static_cast<size_t>(n));
    for (size_t i = first_free_; static_cast<int64_t>(pages.size()) < n; ++i) {
      if (used_[i]) continue;
      used_[i] = true;
      pages.push_back(static_cast<int64_t>(i));
    }
    if (n > 0) first_free_ = static_cast<size_t>(pages.back()) + 1;
    free_count_ -= n;
    return pages;
  }

  // Gives pages back; a page out of range, free already or named twice raises, and nothing changes.
  void free(const std::vector<int64_t>& pages) {
    size_t done = 0;
    try {
      for (; done < pages.size(); ++done) release(pages[done]);
    } catch (...) {
      while (done > 0) used_[static_cast<size_t>(pages[--done])] = true;
      throw;
    }
    for (int64_t page : pages) first_free_ = std::min(first_free_, static_cast<size_t>(page));
    free_count_ += static_cast<int64_t>(pages.size());
  }

  int64_t free_count() const { return free_count_; }
  int64_t used_count() const { return static_cast<int64_t>(used_.size()) - free_count_; }

 private:
  void release(int64_t page) {
    if (page < 0 || page >= static_cast<int64_t>(used_.size())) {
      throw std::invalid_argument("pages must hold numbers in 0.." +
                                  std::to_string(static_cast<int64_t>(used_.size()) - 1) + ", got " +
                                  std::to_string(page));
    }
    if (!used_[static_cast<size_t>(page)]) {
      throw std::invalid_argument("pages must hold pages in use, but page " + std::to_string(page) + " is free");
    }
    used_[static_cast<size_t>(page)] = false;
  }

  std::vector<bool> used_;
  size_t first_free_ = 0;  // no free page lies below
  int64_t free_count_ = 0;
};

}  // namespace dyvte
