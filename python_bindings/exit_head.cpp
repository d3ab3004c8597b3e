#include "dyvte/exit_head.h"

#include "launch.h"
#include "ops.h"

namespace dyvte::bind {
namespace {

constexpr const char* kOp = "exit_head";
constexpr int64_t kAllStates = kMeanVisual | kLastVisual | kMeanText | kLastText;

void check_ranges(const View& text_ranges, int64_t rows) {
  for (int64_t i = 0; i < 2 * text_ranges.size[0]; i += 2) {
    check_value(text_ranges, i, 0, rows);
    check_value(text_ranges, i + 1, text_ranges.as<int32_t>()[i], rows);
  }
}

void take_states(int64_t states, ExitHeadParams& p) {
  if (states < 1 || states > kAllStates) fail(kOp, ": states must be a bit mask in 1..", kAllStates, ", got ", states);
  p.states = static_cast<int16_t>(states);
  for (int32_t bit = 1; bit <= kLastText; bit *= 2) p.n_states += (p.states & bit) != 0;
}

void take_weights(const View& h, const View& w1, const View& w2, const std::optional<Tensor>& bias, ExitHeadParams& p) {
  check_shape(w1, {-1, p.n_states * p.d}, "[h, n_states * d]");
  p.inner = w1.size[0];
  if (p.inner == 0) fail(kOp, ": w1 must have at least one row, got ", w1.shape());
  check_shape(w2, {2, p.inner}, "[2, h]");
  for (const View* w : {&w1, &w2}) {
    check_like(*w, h);
    check_dense(*w);
  }
  p.w1 = w1.data;
  p.w2 = w2.data;
  if (!bias) return;
  const View b1(kOp, "b1", *bias);
  check_shape(b1, {p.inner}, "[h]");
  check_like(b1, h);
  check_dense(b1);
  check_device(h, {&b1});
  p.b1 = b1.data;
}

void take_visual(const View& h, const std::optional<Tensor>& visual_rows, const std::optional<Tensor>& visual_cu,
                 ExitHeadParams& p) {
  constexpr const char* kWhen = " must be given exactly when states asks for a visual state";
  const bool visual = p.states & (kMeanVisual | kLastVisual);
  if (visual != visual_rows.has_value()) fail(kOp, ": visual_rows", kWhen);
  if (visual != visual_cu.has_value()) fail(kOp, ": visual_cu", kWhen);
  if (!visual) return;
  const View rows(kOp, "visual_rows", *visual_rows), cu(kOp, "visual_cu", *visual_cu);
  check_index(rows, {-1}, "[V]");
  check_index(cu, {p.batch + 1}, "[B + 1]");
  check_device(h, {&rows, &cu});
  if (!h.on_cuda()) {
    check_cumulative(cu, rows.size[0]);
    for (int64_t i = 0; i < rows.size[0]; ++i) check_value(rows, i, 0, h.size[0] - 1);
  }
  p.visual_rows = rows.as<int32_t>();
  p.visual_cu = cu.as<int32_t>();
}

}  // namespace

std::tuple<Tensor, Tensor> exit_head(const Tensor& hidden, const Tensor& text_ranges,
                                     const std::optional<Tensor>& visual_rows, const std::optional<Tensor>& visual_cu,
                                     const Tensor& w1, const Tensor& w2, int64_t states, double threshold,
                                     std::optional<double> rms_eps, const std::optional<Tensor>& b1) {
  const View h(kOp, "hidden", hidden), ranges(kOp, "text_ranges", text_ranges), a(kOp, "w1", w1), b(kOp, "w2", w2);
  ExitHeadParams p{};
  p.dtype = data_type(h);
  check_shape(h, {-1, -1}, "[N, d]");
  check_dense(h, 1);
  p.d = h.size[1];
  if (p.d == 0) fail(kOp, ": hidden must have shape [N, d] with d > 0, got ", h.shape());
  check_index(ranges, {-1, 2}, "[B, 2]");
  p.batch = ranges.size[0];
  take_states(states, p);
  check_device(h, {&ranges, &a, &b});
  take_weights(h, a, b, b1, p);
  take_visual(h, visual_rows, visual_cu, p);
  if (!h.on_cuda()) check_ranges(ranges, h.size[0]);
  if (rms_eps && !(*rms_eps >= 0)) fail(kOp, ": rms_eps must be None or not negative, got ", *rms_eps);

  Tensor p_exit = empty({p.batch}, aoti_torch_dtype_float32(), h);
  Tensor exit = empty({p.batch}, aoti_torch_dtype_bool(), h);
  if (p.batch == 0) return {p_exit, exit};
  p.hidden = h.data;
  p.hidden_stride = h.row_stride();
  p.text_ranges = ranges.as<int32_t>();
  p.p_exit = static_cast<float*>(p_exit.data_ptr());
  p.exit = static_cast<bool*>(exit.data_ptr());
  p.threshold = static_cast<float>(threshold);
  p.rms_eps = rms_eps ? static_cast<float>(*rms_eps) : -1.0f;
  DYVTE_LAUNCH_WITH_SCRATCH(h, p, exit_head, DYVTE_CPU_WITH_SCRATCH(p, exit_head));
  return {p_exit, exit};
}

}  // namespace dyvte::bind
