// append_pages: a step's keys and values into their pages, converted or quantized; keys and queries rotated on the way.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace headrace {
namespace {

constexpr int64_t kTokensPerChunk = 4;

// Rows, and the pages they go to, by the caller's names. Everything has heads: ranks 3 and 4.
struct Target {
  const char *name, *pages_name, *scales_name;
  TensorRef rows, prefix, pages, scales, norm;
  bool rotated;

  bool in_int4() const { return pages->dtype == DType::u8; }
  DType type() const { return in_int4() ? DType::i4 : pages->dtype; }
  Scaling scaling() const {
    if (!scales) return Scaling::none;
    return scales->shape[1] == pages->shape[1] ? Scaling::computed : Scaling::given;
  }
  int64_t prefix_dim() const { return prefix ? prefix->shape[2] : 0; }
  int64_t dim() const { return prefix_dim() + rows->shape[2]; }
};

int64_t step_bytes(const Tensor& t, size_t dimension) { return t.strides[dimension] * t.item_bytes(); }

class AppendPages : public Op {
 public:
  AppendPages(const Kernels& kernels, const AppendTensors& t, std::vector<Target> targets, bool interleaved, bool spread, float eps)
      : Op("append_pages"), kernels_(kernels), t_(t), targets_(std::move(targets)), interleaved_(interleaved), spread_(spread), eps_(eps) {
    for (const auto& tensor : {t_.query, t_.slots, t_.table, t_.query_norm})
      if (tensor) in(tensor);
    if (t_.query_out) out(t_.query_out);
    for (const auto& target : targets_) {
      for (const auto& tensor : {target.rows, target.prefix, target.norm})
        if (tensor) in(tensor);
      out(target.pages);
      if (target.scaling() == Scaling::computed) out(target.scales);
      if (target.scaling() == Scaling::given) in(target.scales);
    }
  }
  int64_t chunks(int, const Sizes& sizes, int) const override {
    return (t_.slots->rows(sizes) + kTokensPerChunk - 1) / kTokensPerChunk;
  }
  void run(int, int64_t chunk, Worker& worker, const Sizes& sizes) override {
    int64_t end = std::min((chunk + 1) * kTokensPerChunk, t_.slots->rows(sizes));
    for (int64_t token = chunk * kTokensPerChunk; token < end; ++token) {
      int64_t slot = slot_of(token);
      if (t_.query) rotate_query(token, worker);
      for (const auto& target : targets_) append(target, token, slot, worker);
    }
  }

 private:
  int64_t slot_of(int64_t token) const {
    int64_t slot = *t_.slots->row_as<int32_t>(token);
    const auto& pages = targets_[0].pages->shape;
    if (slot < 0 || slot >= pages[0] * pages[1])
      throw std::invalid_argument("append_pages: slots: expected 0 to " + std::to_string(pages[0] * pages[1] - 1) + ", got " +
                                  std::to_string(slot) + " for token " + std::to_string(token));
    return slot;
  }

  void rotate_query(int64_t token, Worker& worker) const {
    AppendArgs a = args(*t_.query, t_.query_norm, token);
    set_table(a, token);
    a.spread = spread_;
    a.scratch = reinterpret_cast<float*>(worker.scratch(a.dim * 4));
    a.out = t_.query_out->row(token);
    a.out_type = t_.query_out->dtype;
    a.out_step = step_bytes(*t_.query_out, 1);
    kernels_.append_heads(a);
  }

  void append(const Target& target, int64_t token, int64_t slot, Worker& worker) const {
    const Tensor& pages = *target.pages;
    int64_t page = slot / pages.shape[1], offset = slot % pages.shape[1];
    AppendArgs a = args(*target.rows, target.norm, token);
    if (target.rotated) set_table(a, token);
    a.spread = spread_ && &target == &targets_[0];  // keys
    if (target.prefix) {
      a.prefix = target.prefix->row(token);
      a.prefix_dim = target.prefix_dim();
      a.prefix_step = step_bytes(*target.prefix, 1);
      a.prefix_type = target.prefix->dtype;
    }
    a.scratch = reinterpret_cast<float*>(worker.scratch(target.dim() * 4));
    a.out = pages.row(page) + offset * step_bytes(pages, 1);
    a.out_type = target.type();
    a.out_step = step_bytes(pages, 2);
    a.scaling = target.scaling();
    if (a.scaling != Scaling::none) set_scales(a, target, page, offset);
    if (!kernels_.append_heads(a))
      throw std::invalid_argument(std::string("append_pages: ") + target.name + ": expected numbers, which " +
                                  dtype_name(target.type()) + " can hold, got NaN for token " + std::to_string(token));
  }

  AppendArgs args(const Tensor& rows, const TensorRef& norm, int64_t token) const {
    AppendArgs a{};
    a.x = rows.row(token);
    a.x_type = rows.dtype;
    a.x_step = step_bytes(rows, 1);
    a.heads = rows.shape[1];
    a.dim = rows.shape[2];
    a.norm_weight = norm ? norm->at<float>() : nullptr;
    a.eps = eps_;
    a.scaling = Scaling::none;
    return a;
  }

  void set_table(AppendArgs& a, int64_t token) const {
    if (!t_.table) return;
    a.table = t_.table->row_as<float>(token);
    a.rotary_dim = t_.table->shape[1];
    a.interleaved = interleaved_;
  }

  static void set_scales(AppendArgs& a, const Target& target, int64_t page, int64_t offset) {
    const Tensor& scales = *target.scales;
    a.scale_step = step_bytes(scales, 2);
    a.scales = scales.row(page) + (a.scaling == Scaling::computed ? offset * step_bytes(scales, 1) : 0);
    if (a.scaling == Scaling::computed) return;
    for (int64_t head = 0; head < a.heads; ++head) {
      float scale = *reinterpret_cast<const float*>(a.scales + head * a.scale_step);
      if (!(scale > 0 && std::isfinite(scale)))
        throw std::invalid_argument(std::string("append_pages: ") + target.scales_name + ": expected finite numbers above 0, got " +
                                    std::to_string(scale) + " for page " + std::to_string(page));
    }
  }

  const Kernels& kernels_;
  AppendTensors t_;
  std::vector<Target> targets_;
  bool interleaved_, spread_;
  float eps_;
};

// The same memory with a dimension for its one head, where it has none: [tokens, dim] and [pages, page_size, dim].
TensorRef with_heads(const TensorRef& t, size_t rank) {
  if (!t || t->shape.size() + 1 != rank) return t;
  auto v = std::make_shared<Tensor>(*t);
  v->shape.insert(v->shape.end() - 1, 1);
  v->strides.insert(v->strides.end() - 1, 0);
  v->base = t->base ? t->base : t;
  return v;
}

void check_last(const Expect& expect, const Tensor& t, const char* name) {
  bool packed = t.strides.back() == 1 || t.shape.back() <= 1 || t.capacity_bytes() == 0;
  expect.that(packed, name, "a contiguous last dimension", shape_text(t) + " with other strides");
}

const auto kFloats = {DType::f32, DType::f16, DType::bf16};

void check_rows(const Expect& expect, const Tensor& t, const char* name, int64_t tokens) {
  expect.dtype(t, name, kFloats);
  expect.that(t.shape.size() == 3, name, "[tokens, heads, dim]", shape_text(t));
  expect.shape(t, name, {tokens, -1, -1});
  check_last(expect, t, name);
}

void check_norm(const Expect& expect, const TensorRef& norm, const char* name, int64_t dim) {
  if (!norm) return;
  expect.dtype(*norm, name, {DType::f32});
  expect.shape(*norm, name, {dim});
  check_last(expect, *norm, name);
}

void check_table(const Expect& expect, const Tensor& table, int64_t tokens, int64_t dim) {
  expect.dtype(table, "table", {DType::f32});
  expect.shape(table, "table", {tokens, -1});
  expect.that(table.shape[1] % 2 == 0 && table.shape[1] <= dim, "table",
              "[tokens, rotary_dim], rotary_dim even and at most " + std::to_string(dim), shape_text(table));
  expect.packed(table, "table");
}

void check_query(const Expect& expect, const AppendTensors& t, int64_t tokens) {
  check_rows(expect, *t.query, t.latent ? "query_rope" : "query", tokens);
  check_norm(expect, t.query_norm, "query_norm", t.query->shape[2]);
  if (t.table) check_table(expect, *t.table, tokens, t.query->shape[2]);
  check_rows(expect, *t.query_out, "out", tokens);
  expect.shape(*t.query_out, "out", {tokens, t.query->shape[1], t.query->shape[2]});
}

void check_pages(const Expect& expect, const Target& target) {
  const char* name = target.pages_name;
  const Tensor& pages = *target.pages;
  expect.dtype(pages, name, {DType::f32, DType::f16, DType::bf16, DType::f8, DType::i8, DType::u8});
  int64_t items = target.in_int4() ? (target.dim() + 1) / 2 : target.dim();
  expect.shape(pages, name, {-1, -1, target.rows->shape[1], items});
  check_last(expect, pages, name);
}

void check_scales(const Expect& expect, const Target& target) {
  const char* name = target.scales_name;
  std::string of = std::string(" for pages of ") + dtype_name(target.type());
  bool needed = target.type() == DType::i8 || target.type() == DType::i4;
  if (!target.scales) return expect.that(!needed, name, "an array" + of, "none");
  const Tensor& scales = *target.scales;
  expect.that(needed || target.type() == DType::f8, name, "none" + of, shape_text(scales));
  expect.dtype(scales, name, {DType::f32});
  int64_t pages = target.pages->shape[0], page_size = target.pages->shape[1], heads = target.rows->shape[1];
  bool rank = scales.shape.size() == 3;
  expect.shape(scales, name, {pages, rank && scales.shape[1] == 1 ? 1 : page_size, heads});
}

void check_target(const Expect& expect, const Target& target, const AppendTensors& t, int64_t tokens) {
  check_rows(expect, *target.rows, target.name, tokens);
  if (target.prefix) {
    check_rows(expect, *target.prefix, "latent", tokens);
    expect.shape(*target.prefix, "latent", {tokens, target.rows->shape[1], -1});
  }
  if (target.rotated) check_table(expect, *t.table, tokens, target.rows->shape[2]);
  check_pages(expect, target);
  check_scales(expect, target);
}

std::vector<Target> targets_of(const AppendTensors& t) {
  bool latent = t.latent != nullptr;
  std::vector<Target> targets{{latent ? "rope_key" : "key", latent ? "latent_pages" : "key_pages",
                               latent ? "scales" : "key_scales", t.key, t.latent, t.key_pages, t.key_scales, t.key_norm,
                               t.table != nullptr}};
  if (t.value) targets.push_back({"value", "value_pages", "value_scales", t.value, nullptr, t.value_pages, t.value_scales, nullptr, false});
  return targets;
}

}  // namespace

void submit_append_pages(Runner& runner, Isa isa, AppendTensors t, bool interleaved, bool spread, float eps) {
  Expect expect{"append_pages"};
  for (TensorRef* rows : {&t.key, &t.latent}) *rows = with_heads(*rows, 3);
  t.key_pages = with_heads(t.key_pages, 4);
  std::vector<Target> targets = targets_of(t);
  expect.that(t.key->shape.size() == 3, targets[0].name, "[tokens, kv_heads, head_dim]", shape_text(*t.key));
  int64_t tokens = t.key->shape[0];
  expect.dtype(*t.slots, "slots", {DType::i32});
  expect.shape(*t.slots, "slots", {tokens});
  if (t.query) check_query(expect, t, tokens);
  if (t.value) expect.shape(*t.value, "value", {tokens, t.key->shape[1], -1});
  for (const auto& target : targets) check_target(expect, target, t, tokens);
  check_norm(expect, t.key_norm, "key_norm", t.key->shape[2]);
  if (t.value) expect.shape(*t.value_pages, "value_pages", {t.key_pages->shape[0], t.key_pages->shape[1], -1, -1});
  runner.submit(std::make_unique<AppendPages>(kernels_for(isa), t, std::move(targets), interleaved, spread, eps));
}

}  // namespace headrace
