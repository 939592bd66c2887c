// The arrays of an attention call, as the ops over them take them: checked once, then the call and each request for kernels.
#pragma once
#include <string>

#include "ops.h"

namespace headrace {

// What is asked of one request, and where its rows begin.
struct Asked {
  int64_t first_row, query_len, key_len;
};

class AttentionArrays {
 public:
  // op: the name in what is said of mistakes.
  AttentionArrays(const AttentionTensors& t, const AttentionOptions& options, const char* op)
      : t_(t), o_(options), op_(op), dense_(t.query->shape.size() == 4) {}

  bool dense() const { return dense_; }
  int64_t kv_heads() const { return key().shape[key().shape.size() - 2]; }
  int64_t heads() const { return t_.query->shape[t_.query->shape.size() - 2]; }
  int64_t group() const { return heads() / kv_heads(); }
  int64_t requests(const Sizes& sizes) const { return dense_ ? t_.query->shape[0] : t_.key_lens->rows(sizes); }
  int64_t key_limit() const {  // keys that a request may have
    return t_.page_table ? t_.page_table->shape[1] * key().shape[1] : dense_ ? key().shape[1] : key().shape[0];
  }
  Asked asked_of(int64_t request) const;
  int64_t key_start(int64_t request) const { return t_.key_starts ? int_at(t_.key_starts, request) : 0; }

  // Throw std::invalid_argument. tokens: rows of the query.
  void check_starts(int64_t requests, int64_t tokens) const;
  void check_request(int64_t request, const Asked& asked, int64_t tokens) const;
  void check_pages(int64_t request, const AttentionWork& work) const;

  AttentionCall call() const;
  AttentionWork work_of(int64_t request, const Asked& asked) const;  // but for which of its rows and keys
  // Where a request's rows begin in an array whose rows are the query's.
  char* rows_of(const TensorRef& t, int64_t request, const Asked& asked) const;

 private:
  const Tensor& key() const { return *t_.key; }
  static int64_t int_at(const TensorRef& t, int64_t i) { return *t->row_as<int32_t>(i); }
  void set_mask(AttentionCall& call) const;
  [[noreturn]] void refuse(const std::string& what) const;

  AttentionTensors t_;
  AttentionOptions o_;
  const char* op_;
  bool dense_;
};

// Of a tensor whose last dimensions are (tokens, heads, dim), the first of them number `token`; of keys, values and scales.
RowStrides row_strides(const Tensor& t, size_t token);
CacheStrides cache_strides(const Tensor& t, int64_t rank, int64_t codes);

// What the arrays must be, but for their contents. Throws std::invalid_argument.
void check_attention(const Expect& expect, const AttentionTensors& tensors, const AttentionOptions& options);
void check_last_dim(const Expect& expect, const TensorRef& t, const char* argument);

}  // namespace headrace
