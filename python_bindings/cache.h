// Checks of the paged cache's arguments, shared by the ops that take one.
#pragma once

#include "checks.h"

namespace dyvte::bind {

inline KvPool check_pool(const View& k_pool, const View& v_pool) {
  check_shape(k_pool, {-1, -1, -1, -1}, "[P, page, Hkv, D]");
  check_shape(v_pool, {k_pool.size[0], k_pool.size[1], k_pool.size[2], k_pool.size[3]}, "[P, page, Hkv, D]");
  check_like(v_pool, k_pool);
  check_dense(k_pool);
  check_dense(v_pool);
  check_device(k_pool, {&v_pool});
  if (k_pool.size[1] == 0) fail(k_pool.op, ": k_pool must have pages of at least one row, got shape ", k_pool.shape());
  return {k_pool.data, v_pool.data, k_pool.size[0], k_pool.size[1], k_pool.size[2], k_pool.size[3]};
}

inline void check_head_dim(const View& v, int64_t dim) {
  if (dim < 1 || dim > kMaxHeadDim)
    fail(v.op, ": ", v.name, " must have a head size in 1..", kMaxHeadDim, ", got ", v.shape());
}

// The table of rotations. Returns how many channels of a head of `dim` are rotated.
inline int64_t check_rotations(const View& cos_sin, int64_t dim) {
  check_shape(cos_sin, {-1, -1}, "[max_pos, rot_dim]");
  check_float32(cos_sin);
  check_dense(cos_sin);
  const int64_t rot_dim = cos_sin.size[1];
  if (rot_dim % 2 == 0 && rot_dim <= dim) return rot_dim;
  fail(cos_sin.op, ": cos_sin must have an even rot_dim of at most the head size ", dim, ", got ", cos_sin.shape());
}

// Heads of q must be a multiple of the K/V heads.
inline void check_groups(const View& q, int64_t heads_q, const View& kv, int64_t heads_kv) {
  if (heads_kv > 0 && heads_q % heads_kv == 0) return;
  fail(q.op, ": ", q.name, " must have a multiple of the ", heads_kv, " heads of ", kv.name, ", got ", heads_q);
}

}  // namespace dyvte::bind
