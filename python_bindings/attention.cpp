#include <algorithm>

#include "cache.h"
#include "dyvte/decode_attention.h"
#include "dyvte/token_score.h"
#include "dyvte/varlen_attention.h"
#include "launch.h"
#include "ops.h"

namespace dyvte::bind {

Tensor token_score(const Tensor& q, const Tensor& k, const Tensor& cu_q, const Tensor& cu_k, double scale) {
  constexpr const char* op = "token_score";
  const View vq(op, "q", q), vk(op, "k", k), cq(op, "cu_q", cu_q), ck(op, "cu_k", cu_k);
  TokenScoreParams p{};
  p.dtype = data_type(vq);
  check_shape(vq, {-1, -1, -1}, "[Nq, Hq, D]");
  check_shape(vk, {-1, -1, vq.size[2]}, "[Nk, Hkv, D]");
  check_like(vk, vq);
  for (const View* t : {&vq, &vk}) check_dense(*t, 1);
  p.rows_q = vq.size[0];
  p.heads_q = vq.size[1];
  p.dim = vq.size[2];
  p.rows_k = vk.size[0];
  p.heads_kv = vk.size[1];
  check_head_dim(vq, p.dim);
  check_groups(vq, p.heads_q, vk, p.heads_kv);
  p.batch = check_offsets(cq);
  check_index(ck, {p.batch + 1}, "[B + 1]");
  check_device(vq, {&vk, &cq, &ck});
  if (!vq.on_cuda()) {
    check_cumulative(cq, p.rows_q);
    check_cumulative(ck, p.rows_k);
  }
  p.q = vq.data;
  p.k = vk.data;
  p.q_stride = vq.row_stride();
  p.k_stride = vk.row_stride();
  p.cu_q = cq.as<int32_t>();
  p.cu_k = ck.as<int32_t>();
  p.scale = static_cast<float>(scale);
  Tensor score = empty({p.rows_k}, aoti_torch_dtype_float32(), vq);
  if (p.rows_k == 0) return score;
  p.score = static_cast<float*>(score.data_ptr());
  DYVTE_LAUNCH_WITH_SCRATCH(vq, p, token_score, DYVTE_CPU_WITH_SCRATCH(p, token_score));
  return score;
}

namespace {

// What both forms of attention to one row per sequence take.
DecodeAttentionParams check_decode(const View& q, const View& k, const View& v, const View& table, const View& lens,
                                   double scale) {
  DecodeAttentionParams p{};
  p.dtype = data_type(q);
  p.pool = check_pool(k, v);
  check_like(k, q);
  check_shape(q, {-1, -1, p.pool.dim}, "[B, Hq, D]");
  check_dense(q, 1);
  p.batch = q.size[0];
  p.heads_q = q.size[1];
  check_head_dim(q, p.pool.dim);
  check_groups(q, p.heads_q, k, p.pool.heads);
  check_int32(table);
  check_shape(table, {p.batch, -1}, "[B, M]");
  check_dense(table, 1);
  check_index(lens, {p.batch}, "[B]");
  check_device(q, {&k, &table, &lens});
  p.max_pages = table.size[1];
  p.table_stride = table.row_stride();
  p.max_len = p.max_pages * p.pool.page;
  p.q = q.data;
  p.q_stride = q.row_stride();
  p.block_table = table.as<int32_t>();
  p.kv_lens = lens.as<int32_t>();
  p.scale = static_cast<float>(scale);
  return p;
}

uint32_t* check_arrived(const View& q, const View& counts, const DecodeAttentionParams& p) {
  check_index(counts, {-1}, "[n]");
  check_device(q, {&counts});
  if (counts.size[0] >= p.batch * p.heads_q) return counts.as<uint32_t>();
  fail(q.op, ": arrived must have at least B * Hq = ", p.batch * p.heads_q, " counts, got ", counts.shape());
}

}  // namespace

Tensor decode_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                        const Tensor& kv_lens, double scale, const std::optional<Tensor>& arrived) {
  constexpr const char* op = "decode_attention";
  const View vq(op, "q", q), k(op, "k_pool", k_pool), v(op, "v_pool", v_pool), table(op, "block_table", block_table),
      lens(op, "kv_lens", kv_lens);
  DecodeAttentionParams p = check_decode(vq, k, v, table, lens, scale);
  if (!vq.on_cuda()) {
    for (int64_t b = 0; b < p.batch; ++b) {
      check_value(lens, b, 0, p.max_len);
      check_pages(table, b * p.table_stride, 0, p.kv_lens[b], p.pool);
    }
  }
  if (arrived) p.arrived = check_arrived(vq, View(op, "arrived", *arrived), p);
  Tensor out = empty({p.batch, p.heads_q, p.pool.dim}, vq.dtype, vq);
  if (p.batch * p.heads_q == 0) return out;
  p.out = out.data_ptr();
  const auto cpu = [p]() mutable {  // lengths are read at every call: a tape outlives those of today
    p.max_len = *std::max_element(p.kv_lens, p.kv_lens + p.batch);
    const auto scratch = host_scratch(decode_attention_cpu_scratch(p));
    p.scratch = scratch.get();
    return decode_attention_cpu(p, torch_parallel_for);
  };
  DYVTE_LAUNCH_WITH_SCRATCH(vq, p, decode_attention, cpu);
  return out;
}

Tensor rope_append_attention_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                              const Tensor& positions, const Tensor& k_pool, const Tensor& v_pool,
                              const Tensor& block_table, const Tensor& lens, double scale, const Tensor& arrived) {
  constexpr const char* op = "rope_append_attention_";
  const View vq(op, "q", q), vk(op, "k", k), vv(op, "v", v), cs(op, "cos_sin", cos_sin),
      pos(op, "positions", positions), kp(op, "k_pool", k_pool), vp(op, "v_pool", v_pool),
      table(op, "block_table", block_table), len(op, "lens", lens), counts(op, "arrived", arrived);
  if (!vq.on_cuda()) fail(op, ": q must be on CUDA; a CPU has rope_append_ and decode_attention");
  DecodeAttentionParams p = check_decode(vq, kp, vp, table, len, scale);
  for (const View* t : {&vk, &vv}) {
    check_shape(*t, {p.batch, p.pool.heads, p.pool.dim}, "[B, Hkv, D]");
    check_dense(*t, 1);
    check_like(*t, vq);
  }
  p.fresh.rot_dim = check_rotations(cs, p.pool.dim);
  check_index(pos, {p.batch}, "[B]");
  check_device(vq, {&vk, &vv, &cs, &pos});
  p.fresh.k = vk.data;
  p.fresh.v = vv.data;
  p.fresh.k_stride = vk.row_stride();
  p.fresh.v_stride = vv.row_stride();
  p.fresh.cos_sin = cs.as<float>();
  p.fresh.positions = pos.as<int32_t>();
  p.arrived = check_arrived(vq, counts, p);
  Tensor out = empty({p.batch, p.heads_q, p.pool.dim}, vq.dtype, vq);
  if (p.batch * p.heads_q == 0) return out;
  p.out = out.data_ptr();
  const auto cpu = [] { return Status("no CPU kernel"); };  // never reached
  DYVTE_LAUNCH_WITH_SCRATCH(vq, p, decode_attention, cpu);
  return out;
}

namespace {

// The arguments that both forms take. K and V have been checked, and hold `heads_kv` heads.
Tensor run_varlen(VarlenAttentionParams& p, const View& q, const View& k, const View& v, const View& cu, double scale,
                  int64_t heads_kv) {
  p.heads_q = q.size[1];
  p.heads_kv = heads_kv;
  p.dim = q.size[2];
  check_head_dim(q, p.dim);
  check_groups(q, p.heads_q, k, p.heads_kv);
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.q_stride = q.row_stride();
  p.cu = cu.as<int32_t>();
  for (int64_t b = 0; b < p.batch; ++b) p.longest = std::max<int64_t>(p.longest, p.cu[b + 1] - p.cu[b]);
  p.scale = static_cast<float>(scale);
  Tensor out = empty({q.size[0], p.heads_q, p.dim}, q.dtype, q);
  p.out = out.data_ptr();
  if (recording) fail(q.op, ": a tape cannot hold it: its work is laid out by the offsets of this call");
  if (p.longest * p.heads_q > 0) check_status(q.op, varlen_attention_cpu(p, torch_parallel_for));
  return out;
}

}  // namespace

Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                        bool causal) {
  constexpr const char* op = "varlen_attention";
  const View vq(op, "q", q), vk(op, "k", k), vv(op, "v", v), cu(op, "cu_seqlens", cu_seqlens);
  if (vq.on_cuda()) fail(op, ": q must be on the CPU; FlashAttention serves CUDA");
  VarlenAttentionParams p{};
  p.dtype = data_type(vq);
  check_shape(vq, {-1, -1, -1}, "[N, Hq, D]");
  check_shape(vk, {vq.size[0], -1, vq.size[2]}, "[N, Hkv, D]");
  check_shape(vv, {vk.size[0], vk.size[1], vk.size[2]}, "[N, Hkv, D]");
  for (const View* t : {&vq, &vk, &vv}) {
    check_like(*t, vq);
    check_dense(*t, 1);
  }
  p.batch = check_offsets(cu);
  check_device(vq, {&vk, &vv, &cu});
  check_cumulative(cu, vq.size[0]);
  p.k_stride = vk.row_stride();
  p.v_stride = vv.row_stride();
  p.causal = causal;
  return run_varlen(p, vq, vk, vv, cu, scale, vk.size[1]);
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                       const Tensor& before, const Tensor& cu_seqlens, double scale) {
  constexpr const char* op = "paged_attention";
  const View vq(op, "q", q), k(op, "k_pool", k_pool), v(op, "v_pool", v_pool), table(op, "block_table", block_table),
      known(op, "before", before), cu(op, "cu_seqlens", cu_seqlens);
  if (vq.on_cuda()) fail(op, ": q must be on the CPU; FlashAttention serves CUDA");
  VarlenAttentionParams p{};
  p.dtype = data_type(vq);
  const KvPool pool = check_pool(k, v);
  check_like(k, vq);
  check_shape(vq, {-1, -1, pool.dim}, "[N, Hq, D]");
  check_dense(vq, 1);
  p.batch = check_offsets(cu);
  check_int32(table);
  check_shape(table, {p.batch, -1}, "[B, M]");
  check_dense(table, 1);
  check_index(known, {p.batch}, "[B]");
  check_device(vq, {&k, &table, &known, &cu});
  check_cumulative(cu, vq.size[0]);
  p.block_table = table.as<int32_t>();
  p.table_stride = table.row_stride();
  p.before = known.as<int32_t>();
  p.page = pool.page;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = cu.as<int32_t>()[b + 1] - cu.as<int32_t>()[b];
    check_value(known, b, 0, table.size[1] * pool.page - rows);
    check_pages(table, b * p.table_stride, 0, p.before[b] + rows, pool);
  }
  p.k_stride = p.v_stride = pool.heads * pool.dim;
  p.causal = true;
  return run_varlen(p, vq, k, v, cu, scale, pool.heads);
}

}  // namespace dyvte::bind
