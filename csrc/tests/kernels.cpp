// Runs every kernel in every implementation on odd sizes, strided and misaligned data, and compares them with each
// other. Meant to run under the address and undefined-behaviour sanitisers; tests/ops compares the CPU kernels with
// torch.
#include <sys/mman.h>

#include <numeric>

#include "implementations.h"

namespace dyvte::test {
namespace {

const DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

std::string label(const char* op, DType dtype, std::initializer_list<int64_t> sizes) {
  std::string text = std::string(op) + (dtype == DType::f32 ? " f32" : dtype == DType::f16 ? " f16" : " bf16");
  for (int64_t s : sizes) text += " " + std::to_string(s);
  return text;
}

void silu_mul(DType dtype, int64_t rows, int64_t m, int64_t extra, int64_t shift) {
  const Values gate_up(dtype, rows * (2 * m + extra), shift);
  compare(label("silu_mul", dtype, {rows, m, extra, shift}), rounding(dtype), [&](const Implementation& with) {
    const Values out(dtype, rows * m, shift);
    out.fill(NAN);
    const SiluMulParams p{gate_up.data(), out.data(), rows, m, 2 * m + extra, dtype};
    check(with.silu_mul(p, threaded_for), "silu_mul");
    std::vector<float> result;
    out.append_to(result);
    return result;
  });
}

void linear(DType dtype, int64_t rows, int64_t n, int64_t k, int64_t shift) {
  const Values x(dtype, rows * (k + shift), shift), weight(dtype, n * (k + 3 * shift), shift), bias(dtype, n, shift);
  for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, weight.get(i) / std::sqrt(static_cast<float>(k)));
  compare(label("linear", dtype, {rows, n, k, shift}), rounding(dtype), [&](const Implementation& with) {
    const Values out(dtype, rows * n, shift);
    out.fill(NAN);
    LinearParams p{
        x.data(),      weight.data(), shift ? bias.data() : nullptr, out.data(), nullptr, rows, n, k, k + shift,
        k + 3 * shift, dtype};
    const Array<float> scratch(linear_cpu_scratch(p));
    p.scratch = scratch.data();
    // No CUDA kernel: the generic one stands in.
    check((with.linear ? with.linear : generic::linear_cpu)(p, threaded_for), "linear");
    std::vector<float> result;
    out.append_to(result);
    return result;
  });
}

void packed_linear(DType dtype, DType weight_dtype, int64_t rows, int64_t n, int64_t k, int64_t shift, bool gated) {
  const int64_t wide = gated ? kPanel / 2 : kPanel, panels = (n + wide - 1) / wide,
                part = weight_dtype == DType::f32 ? 1 : 2;
  const Values x(dtype, rows * (k + shift), shift),
      weight(weight_dtype, panels * (k + part - 1) / part * part * kPanel);
  const Values bias(dtype, n, shift);
  for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, weight.get(i) / std::sqrt(static_cast<float>(k)));
  compare(label("packed_linear", dtype, {rows, n, k, shift, gated}), rounding(dtype), [&](const Implementation& with) {
    const Values out(dtype, rows * n, shift);
    out.fill(NAN);
    const PackedLinearParams p{
        x.data(),     weight.data(), shift && !gated ? bias.data() : nullptr, out.data(), rows, n, k, k + shift, dtype,
        weight_dtype, gated};
    check((with.packed_linear ? with.packed_linear : generic::packed_linear_cpu)(p, threaded_for), "packed_linear");
    std::vector<float> result;
    out.append_to(result);
    return result;
  });
}

void rms_norm(DType dtype, int64_t outer, int64_t inner, int64_t d, int64_t shift, bool add) {
  const int64_t row = inner * d + 8 + shift;
  const Values x(dtype, outer * row, shift), weight(dtype, d, shift), start(dtype, outer * row, shift);
  compare(label("rms_norm", dtype, {outer, inner, d, shift, add}), rounding(dtype), [&](const Implementation& with) {
    const Values residual = start, out(dtype, outer * inner * d, shift);
    out.fill(NAN);
    const RmsNormParams p{
        x.data(), add ? residual.data() : nullptr, weight.data(), out.data(), outer, inner, d, row, d, row, d, 1e-5f,
        dtype};
    check(with.rms_norm(p, threaded_for), "rms_norm");
    std::vector<float> result;
    out.append_to(result);
    residual.append_to(result);
    return result;
  });
}

void layer_norm(DType dtype, int64_t rows, int64_t d, int64_t shift, bool alone) {
  const Values x(dtype, rows * (d + 8), shift), y(dtype, rows * (d + 16), shift), weight(dtype, d, shift),
      bias(dtype, d, shift);
  compare(label("layer_norm", dtype, {rows, d, shift, alone}), rounding(dtype), [&](const Implementation& with) {
    const Values sum(dtype, rows * d, shift), out(dtype, rows * d, shift);
    sum.fill(0.0f);
    out.fill(NAN);
    const LayerNormParams p{x.data(),      alone ? nullptr : y.data(),
                            weight.data(), bias.data(),
                            sum.data(),    out.data(),
                            rows,          d,
                            d + 8,         d + 16,
                            1e-5f,         dtype};
    check(with.layer_norm(p, threaded_for), "layer_norm");
    std::vector<float> result;
    sum.append_to(result);
    out.append_to(result);
    return result;
  });
}

void quick_gelu(DType dtype, int64_t n, int64_t shift) {
  const Values start(dtype, n, shift);
  compare(label("quick_gelu", dtype, {n, shift}), rounding(dtype), [&](const Implementation& with) {
    const Values x = start;
    check(with.quick_gelu({x.data(), n, dtype}, threaded_for), "quick_gelu");
    std::vector<float> result;
    x.append_to(result);
    return result;
  });
}

// A product's arguments, and itself in float64, of rows that are rounded where rms_norm rounds them.
struct Product {
  Values x, norm, weight, bias, factors;
  DecodeProduct p{};

  Product(DType dtype, int64_t rows, int64_t n, int64_t k, bool with_norm, bool with_bias)
      : x(dtype, rows * (k + 8)),
        norm(dtype, k),
        weight(dtype, n * (k + 16)),
        bias(dtype, n),
        factors(dtype, rows * k) {
    for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, weight.get(i) / std::sqrt(static_cast<float>(k)));
    p.x = x.data();
    p.norm = with_norm ? norm.data() : nullptr;
    p.weight = weight.data();
    p.bias = with_bias ? bias.data() : nullptr;
    p.rows = rows;
    p.n = n;
    p.k = k;
    p.x_stride = k + 8;
    p.weight_stride = k + 16;
    p.eps = 1e-5f;
    p.dtype = dtype;
    for (int64_t b = 0; b < rows; ++b) normalise(b);
  }
  void normalise(int64_t b) const {
    double squares = 0;
    for (int64_t c = 0; c < p.k; ++c) squares += std::pow(x.get(b * p.x_stride + c), 2);
    const double factor = 1 / std::sqrt(squares / static_cast<double>(p.k) + p.eps);
    for (int64_t c = 0; c < p.k; ++c) {
      const int64_t at = b * p.k + c;
      factors.set(at, x.get(b * p.x_stride + c) * static_cast<float>(p.norm ? factor : 1.0));
      if (p.norm) factors.set(at, factors.get(at) * norm.get(c));
    }
  }
  double operator()(int64_t b, int64_t row) const {
    double sum = p.bias ? bias.get(row) : 0.0f;
    for (int64_t c = 0; c < p.k; ++c) {
      sum += static_cast<double>(factors.get(b * p.k + c)) * weight.get(row * p.weight_stride + c);
    }
    return sum;
  }
};

void compare_exact(const std::string& what, DType dtype, const std::vector<float>& got,
                   const std::vector<double>& expected) {
  if (got.size() != expected.size()) check("another number of results", what.c_str());
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]);
    if (error <= rounding(dtype) * std::fmax(1.0, std::fabs(expected[i]))) continue;  // false for NaN
    std::printf("FAILED %s: %g at %zu, %g expected\n", what.c_str(), got[i], i, expected[i]);
    std::exit(1);
  }
}

void compare_exact(const std::string& what, DType dtype, const Values& got, const std::vector<double>& expected) {
  std::vector<float> all;
  got.append_to(all);
  compare_exact(what, dtype, all, expected);
}

void add_linear(DType dtype, int64_t rows, int64_t n, int64_t k, bool bias) {
  const Product product(dtype, rows, n, k, false, bias);
  const Values residual(dtype, rows * (n + 3));
  std::vector<double> expected;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < n + 3; ++i) {
      expected.push_back(residual.get(b * (n + 3) + i) + (i < n ? product(b, i) : 0.0));  // nothing between the rows
    }
  }
  const AddLinearParams p{product.p, residual.data(), n + 3};
  check(add_linear_cuda(p, nullptr), "add_linear");
  compare_exact(label("add_linear", dtype, {rows, n, k, bias}), dtype, residual, expected);
}

void norm_linear(DType dtype, int64_t rows, int64_t n, int64_t k, bool bias) {
  const Product product(dtype, rows, n, k, true, bias);
  std::vector<float> out(rows * n, NAN);
  std::vector<double> expected;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < n; ++i) expected.push_back(product(b, i));
  }
  const NormLinearParams p{product.p, out.data()};
  check(norm_linear_cuda(p, nullptr), "norm_linear");
  compare_exact(label("norm_linear", dtype, {rows, n, k, bias}), dtype, out, expected);
}

void norm_gate_up(DType dtype, int64_t rows, int64_t m, int64_t k, bool bias) {
  const Product product(dtype, rows, 2 * m, k, true, bias);
  const Values out(dtype, rows * m);
  out.fill(NAN);
  std::vector<double> expected;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < m; ++i) {
      const double gate = product(b, i);
      expected.push_back(gate / (1.0 + std::exp(-gate)) * product(b, m + i));
    }
  }
  const NormGateUpParams p{product.p, out.data()};
  check(norm_gate_up_cuda(p, nullptr), "norm_gate_up");
  compare_exact(label("norm_gate_up", dtype, {rows, m, k, bias}), dtype, out, expected);
}

// K and V of all slots, with pages in random order.
struct Cache {
  DType dtype;
  int64_t slots, max_pages, page, heads, dim;
  Values k, v;
  Ints table;

  Cache(DType dtype_, int64_t slots_, int64_t max_pages_, int64_t page_, int64_t heads_, int64_t dim_, int64_t shift)
      : dtype(dtype_),
        slots(slots_),
        max_pages(max_pages_),
        page(page_),
        heads(heads_),
        dim(dim_),
        k(dtype, slots * max_pages * page * heads * dim, shift),
        v(dtype, slots * max_pages * page * heads * dim, shift),
        table(page_table(slots, max_pages)) {}
  KvPool pool() const { return {k.data(), v.data(), slots * max_pages, page, heads, dim}; }
};

void kv_compact(DType dtype, int64_t slots, int64_t page, int64_t heads, int64_t dim, int64_t shift) {
  const Cache start(dtype, slots, 300 / page + 1, page, heads, dim, shift);
  std::vector<int64_t> counts;
  std::vector<int32_t> rows;
  for (int64_t s = 0; s < slots; ++s) {
    const size_t before = rows.size();
    const int64_t keep_of_8 = pick(0, 8);
    for (int32_t r = 0; r < pick(0, 300); ++r) {
      if (pick(0, 7) < keep_of_8) rows.push_back(r);
    }
    counts.push_back(static_cast<int64_t>(rows.size() - before));
  }
  Ints keep(static_cast<int64_t>(rows.size()));
  std::copy(rows.begin(), rows.end(), keep.data());
  const Ints cu = cumulative(counts);
  compare(label("kv_compact", dtype, {slots, page, heads, dim, shift}), 0.0f, [&](const Implementation& with) {
    const Cache cache = start;
    const Ints lens(slots);
    const KvCompactParams p{cache.pool(),    cache.table.data(),
                            lens.data(),     keep.data(),
                            cu.data(),       slots,
                            cache.max_pages, heads * dim * element_size(dtype)};
    check(with.kv_compact(p, threaded_for), "kv_compact");
    std::vector<float> result(lens.data(), lens.data() + slots);
    cache.k.append_to(result);
    cache.v.append_to(result);
    return result;
  });
}

void rope_append(DType dtype, const std::vector<int64_t>& added, int64_t heads_q, int64_t heads, int64_t dim,
                 int64_t rot_dim, int64_t page, int64_t shift) {
  const int64_t batch = static_cast<int64_t>(added.size()),
                rows = std::accumulate(added.begin(), added.end(), int64_t{0});
  const int64_t width = (heads_q + 2 * heads) * dim + 8 + shift, max_pos = 50;
  const Values qkv_start(dtype, rows * width, shift);
  const Cache cache_start(dtype, batch, 60 / page + 1, page, heads, dim, shift);
  Array<float> cos_sin(max_pos * rot_dim);
  for (int64_t i = 0; i < cos_sin.size(); ++i) cos_sin[i] = std::cos(0.1f * static_cast<float>(i));
  Ints positions(rows), lens(batch);
  for (int64_t i = 0; i < rows; ++i) positions[i] = static_cast<int32_t>(pick(0, max_pos - 1));
  for (int64_t b = 0; b < batch; ++b) lens[b] = static_cast<int32_t>(pick(0, 60 - added[b]));
  const Ints cu = cumulative(added);
  compare(label("rope_append", dtype, {rows, heads_q, heads, dim, rot_dim, page, shift}), rounding(dtype),
          [&](const Implementation& with) {
            const Values qkv = qkv_start;
            const Cache cache = cache_start;
            char* base = static_cast<char*>(qkv.data());
            RopeAppendParams p{};
            p.q = base;
            p.k = base + heads_q * dim * element_size(dtype);
            p.v = base + (heads_q + heads) * dim * element_size(dtype);
            p.q_stride = p.k_stride = p.v_stride = width;
            p.cos_sin = cos_sin.data();
            p.positions = positions.data();
            p.cu_seqlens = cu.data();
            p.pool = cache.pool();
            p.block_table = cache.table.data();
            p.lens = lens.data();
            p.rows = rows;
            p.batch = batch;
            p.heads_q = heads_q;
            p.rot_dim = rot_dim;
            p.max_pages = p.table_stride = cache.max_pages;
            p.dtype = dtype;
            check(with.rope_append(p, threaded_for), "rope_append");
            std::vector<float> result;
            qkv.append_to(result);
            cache.k.append_to(result);
            cache.v.append_to(result);
            return result;
          });
}

void norm_qkv_append(DType dtype, int64_t rows, int64_t heads_q, int64_t heads, int64_t dim, int64_t k, int64_t page,
                     bool bias) {
  const int64_t max_pos = 50, all = heads_q + 2 * heads;
  const Product product(dtype, rows, all * dim, k, true, bias);
  const Cache cache(dtype, rows, 60 / page + 1, page, heads, dim, 0);
  Array<float> cos_sin(max_pos * dim);
  for (int64_t i = 0; i < cos_sin.size(); ++i) cos_sin[i] = std::cos(0.1f * static_cast<float>(i));
  Ints positions(rows), lens(rows);
  std::vector<double> q_expected, pools[2];
  for (int64_t i = 0; i < cache.k.size(); ++i) pools[0].push_back(cache.k.get(i)), pools[1].push_back(cache.v.get(i));
  for (int64_t b = 0; b < rows; ++b) {
    positions[b] = static_cast<int32_t>(pick(0, max_pos - 1));
    lens[b] = static_cast<int32_t>(pick(0, 59));
    const int64_t at = cache.table[b * cache.max_pages + lens[b] / page] * page + lens[b] % page;
    for (int64_t i = 0; i < all * dim; ++i) {
      const int64_t head = i / dim, c = i % dim, half = dim / 2;
      const float* angle = cos_sin.data() + positions[b] * dim + c % half;
      double value = product(b, i);
      if (head < heads_q + heads) {
        const double other = product(b, c < half ? i + half : i - half);
        value = value * angle[0] + (c < half ? -other : other) * angle[half];
      }
      const int64_t of_kv = head - heads_q;
      if (of_kv < 0) q_expected.push_back(value);
      if (of_kv >= 0) pools[of_kv / heads][(at * heads + of_kv % heads) * dim + c] = value;
    }
  }
  const Values q(dtype, rows * heads_q * dim);
  q.fill(NAN);
  const NormQkvAppendParams p{product.p,   q.data(),     cos_sin.data(), positions.data(), cache.table.data(),
                              lens.data(), cache.pool(), heads_q,        cache.max_pages,  cache.max_pages};
  check(norm_qkv_append_cuda(p, nullptr), "norm_qkv_append");
  const std::string what = label("norm_qkv_append", dtype, {rows, heads_q, heads, dim, k, page, bias});
  compare_exact(what + " q", dtype, q, q_expected);
  compare_exact(what + " k", dtype, cache.k, pools[0]);
  compare_exact(what + " v", dtype, cache.v, pools[1]);
}

void token_score(DType dtype, const std::vector<int64_t>& queries, const std::vector<int64_t>& keys, int64_t heads_q,
                 int64_t heads, int64_t dim, int64_t shift) {
  const Ints cu_q = cumulative(queries), cu_k = cumulative(keys);
  TokenScoreParams p{};
  p.batch = static_cast<int64_t>(queries.size());
  p.rows_q = cu_q[p.batch];
  p.rows_k = cu_k[p.batch];
  p.heads_q = heads_q;
  p.heads_kv = heads;
  p.dim = dim;
  p.q_stride = heads_q * dim + shift;
  p.k_stride = heads * dim + 8 * shift;
  const Values q(dtype, p.rows_q * p.q_stride, shift), k(dtype, p.rows_k * p.k_stride, shift);
  p.q = q.data();
  p.k = k.data();
  p.cu_q = cu_q.data();
  p.cu_k = cu_k.data();
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.dtype = dtype;
  compare(label("token_score", dtype, {p.rows_q, p.rows_k, heads_q, heads, dim, shift}), 3e-6f,
          [&](const Implementation& with) {
            const Array<float> score(p.rows_k),
                scratch(with.cuda ? token_score_cuda_scratch(p) : token_score_cpu_scratch(p));
            std::fill(score.data(), score.data() + score.size(), NAN);
            std::fill(scratch.data(), scratch.data() + scratch.size(), NAN);
            p.score = score.data();
            p.scratch = scratch.data();
            check(with.token_score(p, threaded_for), "token_score");
            return std::vector<float>(score.data(), score.data() + score.size());
          });
}

void decode_attention(DType dtype, const std::vector<int64_t>& lens, int64_t heads_q, int64_t heads, int64_t dim,
                      int64_t page, int64_t shift) {
  const int64_t longest = *std::max_element(lens.begin(), lens.end());
  DecodeAttentionParams p{};
  p.batch = static_cast<int64_t>(lens.size());
  const Cache cache(dtype, p.batch, longest / page + 2, page, heads, dim, shift);
  p.heads_q = heads_q;
  p.q_stride = heads_q * dim + 8 * shift;
  const Values q(dtype, p.batch * p.q_stride, shift);
  Ints kv_lens(p.batch);
  std::copy(lens.begin(), lens.end(), kv_lens.data());
  p.q = q.data();
  p.pool = cache.pool();
  p.block_table = cache.table.data();
  p.max_pages = p.table_stride = cache.max_pages;
  p.kv_lens = kv_lens.data();
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.dtype = dtype;
  compare(label("decode_attention", dtype, {p.batch, longest, heads_q, heads, dim, page, shift}), rounding(dtype),
          [&](const Implementation& with) {
            p.max_len = with.cuda ? p.max_pages * page : longest;
            const Array<float> scratch(with.cuda ? decode_attention_cuda_scratch(p) : decode_attention_cpu_scratch(p));
            std::fill(scratch.data(), scratch.data() + scratch.size(), NAN);
            const Values out(dtype, p.batch * heads_q * dim, shift);
            out.fill(NAN);
            p.out = out.data();
            p.scratch = scratch.data();
            check(with.decode_attention(p, threaded_for), "decode_attention");
            std::vector<float> result, in_one;
            out.append_to(result);
            if (!with.cuda) return result;
            const Array<uint32_t> arrived(p.batch * heads_q);
            for (int i = 0; i < 2; ++i) {  // the second time with what the first left
              out.fill(NAN);
              std::fill(scratch.data(), scratch.data() + scratch.size(), NAN);
              DecodeAttentionParams one = p;
              one.arrived = arrived.data();
              check(with.decode_attention(one, threaded_for), "decode_attention in one kernel");
              in_one.clear();
              out.append_to(in_one);
              if (in_one != result) check("one kernel and two differ", "decode_attention");
            }
            if (std::any_of(arrived.data(), arrived.data() + arrived.size(), [](uint32_t n) { return n; }))
              check("a count was left", "decode_attention");
            return result;
          });
}

// A decoding step's rotation, appending and attention in one kernel, and in one and a half: the bits of all by
// themselves.
void attend_to_new_rows(DType dtype, const std::vector<int64_t>& lens, int64_t heads_q, int64_t heads, int64_t dim,
                        int64_t rot_dim, int64_t page, int64_t shift) {
  const int64_t batch = static_cast<int64_t>(lens.size()), longest = *std::max_element(lens.begin(), lens.end());
  const int64_t width = (heads_q + 2 * heads) * dim + 8 + shift, max_pos = 50, size = element_size(dtype);
  const Values qkv(dtype, batch * width, shift), turned = qkv;
  const Cache cache(dtype, batch, longest / page + 2, page, heads, dim, shift), appended = cache;
  Array<float> cos_sin(max_pos * rot_dim);
  for (int64_t i = 0; i < cos_sin.size(); ++i) cos_sin[i] = std::cos(0.1f * static_cast<float>(i));
  Ints positions(batch), before(batch), after(batch);
  for (int64_t b = 0; b < batch; ++b) {
    positions[b] = static_cast<int32_t>(pick(0, max_pos - 1));
    before[b] = static_cast<int32_t>(lens[b]);
    after[b] = before[b] + 1;
  }
  const Ints cu = cumulative(std::vector<int64_t>(batch, 1));
  const auto part = [&](const Values& of, int64_t head) { return static_cast<char*>(of.data()) + head * dim * size; };
  const RopeAppendParams append{part(turned, 0),
                                part(turned, heads_q),
                                part(turned, heads_q + heads),
                                width,
                                width,
                                width,
                                cos_sin.data(),
                                positions.data(),
                                cu.data(),
                                appended.pool(),
                                cache.table.data(),
                                before.data(),
                                batch,
                                batch,
                                heads_q,
                                rot_dim,
                                cache.max_pages,
                                cache.max_pages,
                                dtype};
  check(rope_append_cuda(append, nullptr), "rope_append");

  DecodeAttentionParams p{};
  p.block_table = cache.table.data();
  p.q_stride = width;
  p.batch = batch;
  p.heads_q = heads_q;
  p.max_pages = p.table_stride = cache.max_pages;
  p.max_len = cache.max_pages * page;
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.dtype = dtype;
  const Array<uint32_t> arrived(batch * heads_q);
  const auto run = [&](const Values& rows, const Cache& in, const Ints& kv_lens, bool fresh, uint32_t* counts) {
    p.q = part(rows, 0);
    p.pool = in.pool();
    p.kv_lens = kv_lens.data();
    p.arrived = counts;
    p.fresh = {};
    if (fresh) {
      p.fresh = {
          part(rows, heads_q), part(rows, heads_q + heads), width, width, cos_sin.data(), positions.data(), rot_dim};
    }
    const Array<float> scratch(decode_attention_cuda_scratch(p));
    std::fill(scratch.data(), scratch.data() + scratch.size(), NAN);
    const Values out(dtype, batch * heads_q * dim, shift);
    out.fill(NAN);
    p.out = out.data();
    p.scratch = scratch.data();
    check(decode_attention_cuda(p, nullptr), "decode_attention");
    std::vector<float> result;
    out.append_to(result);
    in.k.append_to(result);
    in.v.append_to(result);
    return result;
  };
  const std::vector<float> expected = run(turned, appended, after, false, nullptr);
  const std::string what =
      label("attend_to_new_rows", dtype, {batch, longest, heads_q, heads, dim, rot_dim, page, shift});
  for (int64_t b = 0; b < batch; ++b) {  // what is there before is no number, and of no meaning
    const int64_t at = cache.table[b * cache.max_pages + before[b] / page] * page + before[b] % page;
    for (int64_t i = 0; i < heads * dim; ++i) {
      cache.k.set(at * heads * dim + i, NAN);
      cache.v.set(at * heads * dim + i, NAN);
    }
  }
  for (uint32_t* counts : {arrived.data(), static_cast<uint32_t*>(nullptr)}) {
    const Cache here = cache;
    if (run(qkv, here, before, true, counts) != expected) check("other bits than those of two kernels", what.c_str());
  }
  if (std::any_of(arrived.data(), arrived.data() + arrived.size(), [](uint32_t n) { return n; }))
    check("a count was left", what.c_str());
}

// A query, or a cached row, that is no number shows in every output that it reaches, also where the row has a split for
// itself.
void attend_to_nan(DType dtype, int64_t rows, bool in_query) {
  constexpr int64_t kDim = 64, kPage = 16;
  const Cache cache(dtype, 1, rows / kPage + 1, kPage, 1, kDim, 0);
  const Values q(dtype, 2 * kDim), out(dtype, 2 * kDim);
  const int64_t last = cache.table[(rows - 1) / kPage] * kPage + (rows - 1) % kPage;
  (in_query ? q : cache.k).set(in_query ? kDim : last * kDim, NAN);
  const Ints lens{static_cast<int32_t>(rows)};
  const Array<uint32_t> arrived(2);
  for (const Implementation& with : implementations()) {
    for (uint32_t* counts : {static_cast<uint32_t*>(nullptr), arrived.data()}) {
      DecodeAttentionParams p{};
      p.q = q.data();
      p.out = out.data();
      p.pool = cache.pool();
      p.block_table = cache.table.data();
      p.kv_lens = lens.data();
      p.q_stride = 2 * kDim;
      p.heads_q = 2;
      p.batch = 1;
      p.max_pages = p.table_stride = cache.max_pages;
      p.max_len = with.cuda ? cache.max_pages * kPage : rows;
      p.scale = 0.1f;
      p.dtype = dtype;
      p.arrived = counts;
      const Array<float> scratch(with.cuda ? decode_attention_cuda_scratch(p) : decode_attention_cpu_scratch(p));
      p.scratch = scratch.data();
      check(with.decode_attention(p, threaded_for), "decode_attention");
      for (int64_t i = 0; i < 2 * kDim; ++i) {
        const bool reached = !in_query || i >= kDim;
        if (std::isnan(out.get(i)) != reached) check("a NaN is lost, or too far", with.name.c_str());
      }
    }
  }
}

void compare_varlen(const std::string& what, VarlenAttentionParams& p, int64_t rows, int64_t shift) {
  compare(what, rounding(p.dtype), [&](const Implementation& with) {
    const Values out(p.dtype, rows * p.heads_q * p.dim, shift);
    out.fill(NAN);
    p.out = out.data();
    const auto kernel = with.varlen_attention ? with.varlen_attention : generic::varlen_attention_cpu;
    check(kernel(p, threaded_for), "varlen_attention");
    std::vector<float> result;
    out.append_to(result);
    return result;
  });
}

void varlen_attention(DType dtype, const std::vector<int64_t>& lengths, int64_t heads_q, int64_t heads, int64_t dim,
                      bool causal, int64_t shift) {
  const Ints cu = cumulative(lengths);
  VarlenAttentionParams p{};
  p.batch = static_cast<int64_t>(lengths.size());
  p.longest = *std::max_element(lengths.begin(), lengths.end());
  p.heads_q = heads_q;
  p.heads_kv = heads;
  p.dim = dim;
  const int64_t rows = cu[p.batch];
  p.q_stride = p.k_stride = p.v_stride = (heads_q + 2 * heads) * dim + shift;
  const Values qkv(dtype, rows * p.q_stride, shift);
  char* base = static_cast<char*>(qkv.data());
  p.q = base;
  p.k = base + heads_q * dim * element_size(dtype);
  p.v = base + (heads_q + heads) * dim * element_size(dtype);
  p.cu = cu.data();
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.causal = causal;
  p.dtype = dtype;
  compare_varlen(label("varlen_attention", dtype, {rows, p.longest, heads_q, heads, dim, causal, shift}), p, rows,
                 shift);
}

// The same over pages, which hold `before[b]` rows that come first and then those of the queries.
void paged_attention(DType dtype, const std::vector<int64_t>& before, const std::vector<int64_t>& lengths,
                     int64_t heads_q, int64_t heads, int64_t dim, int64_t page, int64_t shift) {
  const Ints cu = cumulative(lengths);
  VarlenAttentionParams p{};
  p.batch = static_cast<int64_t>(lengths.size());
  p.longest = *std::max_element(lengths.begin(), lengths.end());
  int64_t most = 0;
  Ints known(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    known[b] = static_cast<int32_t>(before[b]);
    most = std::max(most, before[b] + lengths[b]);
  }
  const Cache cache(dtype, p.batch, (most + page - 1) / page, page, heads, dim, shift);
  p.heads_q = heads_q;
  p.heads_kv = heads;
  p.dim = dim;
  p.q_stride = heads_q * dim + shift;
  p.k_stride = p.v_stride = heads * dim;
  const Values q(dtype, cu[p.batch] * p.q_stride, shift);
  p.q = q.data();
  p.k = cache.k.data();
  p.v = cache.v.data();
  p.cu = cu.data();
  p.block_table = cache.table.data();
  p.table_stride = cache.max_pages;
  p.before = known.data();
  p.page = page;
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.causal = true;
  p.dtype = dtype;
  compare_varlen(label("paged_attention", dtype, {cu[p.batch], most, heads_q, heads, dim, page, shift}), p, cu[p.batch],
                 shift);
}

void exit_head(DType dtype, int64_t batch, int64_t d, int64_t inner, int32_t states, float rms_eps, bool bias,
               int64_t shift) {
  const int64_t rows = 57;
  ExitHeadParams p{};
  p.dtype = dtype;
  p.batch = batch;
  p.d = d;
  p.inner = inner;
  p.states = static_cast<int16_t>(states);
  for (int32_t bit = 1; bit <= kLastText; bit *= 2) p.n_states += (states & bit) != 0;
  p.hidden_stride = d + 8 * shift;
  p.threshold = 0.5f;
  p.rms_eps = rms_eps;
  const Values hidden(dtype, rows * p.hidden_stride, shift), w1(dtype, inner * p.n_states * d, shift),
      w2(dtype, 2 * inner, shift), b1(dtype, inner, shift);
  for (int64_t i = 0; i < w1.size(); ++i) w1.set(i, w1.get(i) / std::sqrt(static_cast<float>(d)));
  for (int64_t i = 0; i < w2.size(); ++i) w2.set(i, w2.get(i) / std::sqrt(static_cast<float>(inner)));
  Ints ranges(2 * batch);
  std::vector<int64_t> visual;
  for (int64_t b = 0; b < batch; ++b) {
    ranges[2 * b] = static_cast<int32_t>(pick(0, rows));
    ranges[2 * b + 1] = static_cast<int32_t>(pick(ranges[2 * b], rows));
    visual.push_back(pick(0, 3) ? pick(1, 40) : 0);
  }
  const Ints cu = cumulative(visual);
  Ints visual_rows(cu[batch]);
  for (int64_t i = 0; i < visual_rows.size(); ++i) visual_rows[i] = static_cast<int32_t>(pick(0, rows - 1));
  p.hidden = hidden.data();
  p.text_ranges = ranges.data();
  p.visual_rows = states & 3 ? visual_rows.data() : nullptr;
  p.visual_cu = states & 3 ? cu.data() : nullptr;
  p.w1 = w1.data();
  p.w2 = w2.data();
  p.b1 = bias ? b1.data() : nullptr;
  compare(label("exit_head", dtype, {batch, d, inner, states, rms_eps >= 0, bias, shift}), 2e-6f,
          [&](const Implementation& with) {
            const Array<float> p_exit(batch), scratch(with.cuda ? exit_head_cuda_scratch(p) : exit_head_cpu_scratch(p));
            const Array<bool> exit(batch);
            std::fill(p_exit.data(), p_exit.data() + batch, NAN);
            std::fill(scratch.data(), scratch.data() + scratch.size(), NAN);
            p.p_exit = p_exit.data();
            p.exit = exit.data();
            p.scratch = scratch.data();
            check(with.exit_head(p, threaded_for), "exit_head");
            std::vector<float> result(p_exit.data(), p_exit.data() + batch);
            for (int64_t b = 0; b < batch; ++b) {
              if (exit[b] != (p_exit[b] > p.threshold)) check("exit is not p_exit > threshold", "exit_head");
            }
            return result;
          });
}

void movement_and_fusions(DType dtype, int64_t shift) {
  for (int64_t d : {2, 7, 83, 64, 1024, 1152, 5128}) layer_norm(dtype, pick(1, 5), d, shift, d % 2);
  for (int64_t n : {1, 7, 83, 64, 4104}) quick_gelu(dtype, n, shift);
  for (int64_t m : {1, 7, 83, 64, 769, 4104}) silu_mul(dtype, pick(0, 5), m, shift ? 1 : 8, shift);
  for (int64_t d : {1, 7, 83, 64, 769, 1032, 4104, 5120, 8192, 16392}) {
    rms_norm(dtype, pick(1, 5), 1, d, shift, true);
    rms_norm(dtype, pick(1, 9), 3, d, shift, false);
  }
  for (int64_t k : {1, 7, 83, 64, 769}) {
    linear(dtype, pick(1, 9), pick(1, 200), k, shift);
    for (bool gated : {false, true}) {
      if (dtype != DType::f16) packed_linear(dtype, DType::bf16, pick(1, 120), pick(1, 200), k, shift, gated);
      if (dtype == DType::f32) packed_linear(dtype, dtype, pick(1, 120), pick(1, 200), 2 * k, shift, gated);
    }
  }
  kv_compact(dtype, 4, 16, 2, 64, shift);
  kv_compact(dtype, 3, 301, 1, 83, shift);
  kv_compact(dtype, 7, 1, 3, 7, shift);
  rope_append(dtype, {1}, 4, 2, 64, 64, 16, shift);
  rope_append(dtype, {0, 7, 1, 0, 30}, 8, 2, 128, 128, 16, shift);
  rope_append(dtype, {3, 0, 2}, 3, 1, 80, 32, 64, shift);
  rope_append(dtype, {5, 1}, 2, 2, 83, 82, 7, shift);
  rope_append(dtype, {4}, 1, 1, 7, 0, 3, shift);
}

void attention(DType dtype, int64_t shift) {
  decode_attention(dtype, {1}, 2, 2, 64, 16, shift);
  decode_attention(dtype, {0, 83, 7, 170}, 8, 2, 64, 16, shift);
  decode_attention(dtype, {263}, 7, 1, 128, 256, shift);
  decode_attention(dtype, {0, 0}, 4, 4, 80, 5, shift);
  decode_attention(dtype, {40, 513}, 9, 1, 83, 64, shift);
  decode_attention(dtype, {64, 130}, 2, 1, 256, 32, shift);
  decode_attention(dtype, {37, 2}, 3, 1, 7, 8, shift);
  decode_attention(dtype, {192, 1, 0, 195}, 80, 2, 40, 4, shift);
  for (int64_t rows : {1, 3, 40}) {
    attend_to_nan(dtype, rows, false);
    attend_to_nan(dtype, rows, true);
  }
  attend_to_new_rows(dtype, {0}, 2, 2, 64, 64, 16, shift);
  attend_to_new_rows(dtype, {0, 83, 7, 170, 31, 32, 15, 16}, 8, 2, 64, 64, 16, shift);
  attend_to_new_rows(dtype, {263, 1}, 7, 1, 128, 128, 256, shift);
  attend_to_new_rows(dtype, {640}, 5, 5, 128, 128, 64, shift);
  attend_to_new_rows(dtype, {40, 513, 0}, 18, 2, 80, 32, 7, shift);
  attend_to_new_rows(dtype, {64, 130}, 2, 1, 256, 256, 32, shift);
  attend_to_new_rows(dtype, {37, 2}, 9, 1, 83, 82, 8, shift);
  attend_to_new_rows(dtype, {5, 0}, 3, 1, 7, 0, 1, shift);
  for (bool causal : {false, true}) {
    varlen_attention(dtype, {1}, 1, 1, 1, causal, shift);
    varlen_attention(dtype, {0, 83, 7, 130, 1}, 6, 2, 64, causal, shift);
    varlen_attention(dtype, {65, 17}, 3, 1, 83, causal, shift);
    varlen_attention(dtype, {31}, 2, 2, 256, causal, shift);
    varlen_attention(dtype, {24, 97}, 4, 2, 72, causal, shift);
  }
  paged_attention(dtype, {0}, {1}, 1, 1, 1, 1, shift);
  paged_attention(dtype, {144, 0, 70, 9}, {20, 65, 0, 1}, 6, 2, 64, 16, shift);
  paged_attention(dtype, {129}, {17}, 3, 1, 83, 5, shift);
  paged_attention(dtype, {31, 200}, {2, 70}, 2, 2, 256, 64, shift);
  token_score(dtype, {1}, {83}, 2, 2, 64, shift);
  token_score(dtype, {1, 0, 7, 40, 5, 3}, {149, 9, 7, 67, 0, 1}, 6, 2, 83, shift);
  token_score(dtype, {0, 0}, {3, 4}, 2, 1, 7, shift);
  token_score(dtype, {1, 1, 1}, {200, 7, 1}, 6, 2, 64, shift);
  token_score(dtype, {3, 0, 2, 0, 0, 1}, {149, 9, 7, 67, 0, 4}, 6, 2, 83, shift);  // as many rows as sequences
  token_score(dtype, {5, 0, 0, 0, 0}, {2, 9, 0, 1, 1}, 130, 2, 16, shift);
  token_score(dtype, {65, 16}, {65, 128}, 4, 1, 128, shift);
}

void decode_products(DType dtype) {
  for (int64_t rows = 1; rows <= kDecodeRows; ++rows) add_linear(dtype, rows, pick(1, 300), 8 * pick(1, 200), rows % 2);
  for (int64_t rows = 1; rows <= kDecodeRows; ++rows)
    norm_gate_up(dtype, rows, pick(1, 150), 8 * pick(1, 200), rows % 2);
  add_linear(dtype, 3, 83, 2048, false);  // as many channels as the warps take in whole steps
  norm_gate_up(dtype, 8, 520, 1032, false);
  norm_gate_up(dtype, 5, 1, 8, true);
  norm_linear(dtype, 1, 83, 520, true);
  norm_linear(dtype, 6, 16, 1024, false);
  norm_qkv_append(dtype, 1, 2, 2, 64, 1024, 16, false);
  norm_qkv_append(dtype, 8, 6, 2, 80, 264, 5, true);
  norm_qkv_append(dtype, 4, 3, 1, 96, 72, 64, true);
  norm_qkv_append(dtype, 7, 9, 3, 128, 576, 16, false);
  norm_qkv_append(dtype, 2, 1, 1, 16, 8, 1, true);
}

void heads(DType dtype, int64_t shift) {
  for (int64_t batch : {1, 3, 10}) {
    exit_head(dtype, batch, 64, 16, 12, -1.0f, false, shift);
    exit_head(dtype, batch, 83, 7, 15, 1e-6f, true, shift);
    exit_head(dtype, batch, 264, 19, 9, 1e-6f, true, shift);
    exit_head(dtype, batch, 7, 1, 4, -1.0f, true, shift);
  }
  exit_head(dtype, 9, 1096, 19, 14, 1e-6f, true, shift);  // more channels than the warps of a block take at once
  exit_head(dtype, 2, 1024, 33, 3, -1.0f, false, shift);
}

// Pages of K and V beyond element 2^31 of a pool hold what the first pages of a small pool hold. Most of the memory is
// never touched.
struct Pages {
  static constexpr int64_t kPage = 16, kHeads = 2, kDim = 64;
  int64_t count, bytes;
  char* memory;

  explicit Pages(int64_t count_) : count(count_), bytes(2 * count * kPage * kHeads * kDim * 2) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) check("no address space", "far_pages");
    memory = static_cast<char*>(mapped);
  }
  ~Pages() { munmap(memory, bytes); }
  KvPool pool() const { return {memory, memory + bytes / 2, count, kPage, kHeads, kDim}; }
};

// Appends rows on the last two pages, drops every other one and attends to the rest.
std::vector<float> use_last_pages(const Implementation& with, const Pages& pages, const Values& qkv_start) {
  constexpr int64_t kRows = 21, kHeads = Pages::kHeads, kDim = Pages::kDim, kWidth = 3 * kHeads * kDim;
  const Values qkv = qkv_start, out(DType::bf16, kHeads * kDim);
  const Ints table{static_cast<int32_t>(pages.count - 1), static_cast<int32_t>(pages.count - 2)}, zero{0}, cu{0, kRows};
  const Ints positions(kRows), lens{kRows}, keep(kRows / 2), keep_cu{0, kRows / 2};
  for (int32_t i = 0; i < kRows / 2; ++i) keep[i] = 2 * i + 1;
  const Array<float> cos_sin(kDim);
  std::fill(cos_sin.data(), cos_sin.data() + kDim, 0.6f);
  constexpr int64_t kRowBytes = kHeads * kDim * 2;
  char* base = static_cast<char*>(qkv.data());

  RopeAppendParams append{};
  append.q = base;
  append.k = base + kRowBytes;
  append.v = base + 2 * kRowBytes;
  append.q_stride = append.k_stride = append.v_stride = kWidth;
  append.cos_sin = cos_sin.data();
  append.positions = positions.data();
  append.cu_seqlens = cu.data();
  append.pool = pages.pool();
  append.block_table = table.data();
  append.lens = zero.data();
  append.rows = kRows;
  append.batch = 1;
  append.heads_q = kHeads;
  append.rot_dim = kDim;
  append.max_pages = append.table_stride = 2;
  append.dtype = DType::bf16;
  check(with.rope_append(append, threaded_for), "rope_append");

  const KvCompactParams compact{pages.pool(), table.data(), lens.data(), keep.data(), keep_cu.data(), 1, 2, kRowBytes};
  check(with.kv_compact(compact, threaded_for), "kv_compact");

  DecodeAttentionParams attend{};
  attend.q = base;
  attend.out = out.data();
  attend.pool = pages.pool();
  attend.block_table = table.data();
  attend.kv_lens = lens.data();
  attend.q_stride = kWidth;
  attend.batch = 1;
  attend.heads_q = kHeads;
  attend.max_pages = attend.table_stride = 2;
  attend.max_len = with.cuda ? 2 * Pages::kPage : lens[0];
  attend.scale = 0.1f;
  attend.dtype = DType::bf16;
  const Array<float> scratch(with.cuda ? decode_attention_cuda_scratch(attend) : decode_attention_cpu_scratch(attend));
  attend.scratch = scratch.data();
  check(with.decode_attention(attend, threaded_for), "decode_attention");
  std::vector<float> result;
  out.append_to(result);
  if (!with.cuda) return result;
  attend.fresh = {base + kRowBytes, base + 2 * kRowBytes, kWidth, kWidth,
                  cos_sin.data(),   positions.data(),     kDim};  // one more row
  check(decode_attention_cuda(attend, nullptr), "decode_attention with a new row");
  out.append_to(result);
  for (int64_t half : {int64_t{0}, pages.bytes / 2}) {
    const char* row = pages.memory + half + (table[0] * Pages::kPage + lens[0]) * kRowBytes;
    result.insert(result.end(), row, row + kRowBytes);
  }
  return result;
}

void far_pages() {
  const Values qkv(DType::bf16, 21 * 3 * Pages::kHeads * Pages::kDim);
  const Pages near(2), far((int64_t{1} << 20) + 2);
  for (const Implementation& with : implementations()) {
    if (use_last_pages(with, near, qkv) != use_last_pages(with, far, qkv))
      check("pages beyond element 2^31 differ", with.name.c_str());
  }
}

void empty_batches() {
  for (const Implementation& with : implementations()) {
    check(with.exit_head({}, threaded_for), "exit_head");
    check(with.kv_compact({}, threaded_for), "kv_compact");
    check(with.rope_append({}, threaded_for), "rope_append");
    check(with.token_score({}, threaded_for), "token_score");
    check(with.decode_attention({}, threaded_for), "decode_attention");
    check(with.rms_norm({}, threaded_for), "rms_norm");
    check(with.silu_mul({}, threaded_for), "silu_mul");
    check(with.layer_norm({}, threaded_for), "layer_norm");
    check(with.quick_gelu({}, threaded_for), "quick_gelu");
  }
}

// A grid of so many blocks is refused; its low 32 bits alone would be one block.
void too_many_rows() {
  const Values gate_up(DType::f32, 2), out(DType::f32, 1);
  const SiluMulParams p{gate_up.data(), out.data(), (int64_t{1} << 32) + 1, 1, 2, DType::f32};
  if (silu_mul_cuda(p, nullptr) == nullptr) check("2^32 + 1 rows were taken as one", "silu_mul");
}

}  // namespace
}  // namespace dyvte::test

int main() {
  using namespace dyvte::test;
  for (dyvte::DType dtype : kDTypes) {
    for (int64_t shift : {0, 1}) {
      movement_and_fusions(dtype, shift);
      if (dtype == dyvte::DType::f16 && shift) continue;  // nothing that bf16 does not do
      attention(dtype, shift);
      heads(dtype, shift);
    }
  }
  for (dyvte::DType dtype : {dyvte::DType::f16, dyvte::DType::bf16}) decode_products(dtype);
  far_pages();
  empty_batches();
  too_many_rows();
  std::printf("ok:");
  for (const Implementation& implementation : implementations()) std::printf(" %s", implementation.name.c_str());
  std::printf(" agree\n");
}
