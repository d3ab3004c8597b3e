#include "cache.h"
#include "dyvte/kv_compact.h"
#include "dyvte/rope_append.h"
#include "launch.h"
#include "ops.h"

namespace dyvte::bind {
namespace {

void check_keep(const View& keep, const View& keep_cu, const View& lens, const View& table, const KvPool& pool) {
  check_cumulative(keep_cu, keep.size[0]);
  const int64_t slots = keep_cu.size[0] - 1, max_pages = table.size[2];
  for (int64_t s = 0; s < slots; ++s) {
    check_value(lens, s, 0, max_pages * pool.page);
    const int64_t begin = keep_cu.as<int32_t>()[s], end = keep_cu.as<int32_t>()[s + 1], len = lens.as<int32_t>()[s];
    int64_t low = 0;
    for (int64_t i = begin; i < end; ++i) {
      check_value(keep, i, low, len - 1);
      low = keep.as<int32_t>()[i] + 1;
    }
    if (begin < end) check_pages(table, s * max_pages, 0, low, pool);
  }
}

}  // namespace

void kv_compact_(const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table, const Tensor& lens,
                 const Tensor& keep, const Tensor& keep_cu) {
  constexpr const char* op = "kv_compact_";
  const View k(op, "k_pool", k_pool), v(op, "v_pool", v_pool), table(op, "block_table", block_table),
      len(op, "lens", lens), rows(op, "keep", keep), cu(op, "keep_cu", keep_cu);
  KvCompactParams p{};
  const DType dtype = data_type(k);
  p.pool = check_pool(k, v);
  check_index(table, {-1, -1, -1}, "[L, B, M]");
  check_index(len, {table.size[0], table.size[1]}, "[L, B]");
  check_index(rows, {-1}, "[K]");
  p.slots = table.size[0] * table.size[1];
  check_index(cu, {p.slots + 1}, "[L * B + 1]");
  check_device(k, {&table, &len, &rows, &cu});
  if (!k.on_cuda()) check_keep(rows, cu, len, table, p.pool);
  p.block_table = table.as<int32_t>();
  p.lens = len.as<int32_t>();
  p.keep = rows.as<int32_t>();
  p.keep_cu = cu.as<int32_t>();
  p.max_pages = table.size[2];
  p.row_bytes = p.pool.heads * p.pool.dim * element_size(dtype);
  if (p.slots > 0) DYVTE_LAUNCH(k, p, kv_compact);
}

namespace {

void check_append(const View& positions, const View& cu, const View& lens, const View& table, const RopeAppendParams& p,
                  int64_t max_pos) {
  for (int64_t i = 0; i < p.rows; ++i) check_value(positions, i, 0, max_pos - 1);
  check_cumulative(cu, p.rows);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t added = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    if (added == 0) continue;
    check_value(lens, b, 0, p.max_pages * p.pool.page - added);
    check_pages(table, b * p.table_stride, p.lens[b], p.lens[b] + added, p.pool);
  }
}

}  // namespace

void rope_append_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin, const Tensor& positions,
                  const Tensor& cu_seqlens, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                  const Tensor& lens) {
  constexpr const char* op = "rope_append_";
  const View vq(op, "q", q), vk(op, "k", k), vv(op, "v", v), cs(op, "cos_sin", cos_sin),
      pos(op, "positions", positions), cu(op, "cu_seqlens", cu_seqlens), kp(op, "k_pool", k_pool),
      vp(op, "v_pool", v_pool), table(op, "block_table", block_table), len(op, "lens", lens);
  RopeAppendParams p{};
  p.dtype = data_type(vq);
  p.pool = check_pool(kp, vp);
  check_shape(vq, {-1, -1, p.pool.dim}, "[N, Hq, D]");
  p.rows = vq.size[0];
  p.heads_q = vq.size[1];
  for (const View* t : {&vk, &vv}) check_shape(*t, {p.rows, p.pool.heads, p.pool.dim}, "[N, Hkv, D]");
  for (const View* t : {&vq, &vk, &vv}) check_dense(*t, 1);
  for (const View* t : {&vk, &vv, &kp}) check_like(*t, vq);
  p.rot_dim = check_rotations(cs, p.pool.dim);
  check_index(pos, {p.rows}, "[N]");
  p.batch = check_offsets(cu);
  check_int32(table);
  check_shape(table, {p.batch, -1}, "[B, M]");
  check_dense(table, 1);
  check_index(len, {p.batch}, "[B]");
  check_device(vq, {&vk, &vv, &cs, &pos, &cu, &kp, &table, &len});
  p.q = vq.data;
  p.k = vk.data;
  p.v = vv.data;
  p.q_stride = vq.row_stride();
  p.k_stride = vk.row_stride();
  p.v_stride = vv.row_stride();
  p.cos_sin = cs.as<float>();
  p.positions = pos.as<int32_t>();
  p.cu_seqlens = cu.as<int32_t>();
  p.block_table = table.as<int32_t>();
  p.table_stride = table.row_stride();
  p.max_pages = table.size[1];
  p.lens = len.as<int32_t>();
  if (!vq.on_cuda()) check_append(pos, cu, len, table, p, cs.size[0]);
  if (p.rows > 0) DYVTE_LAUNCH(vq, p, rope_append);
}

}  // namespace dyvte::bind
