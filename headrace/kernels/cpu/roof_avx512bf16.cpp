// bf16 throughput of VDPBF16PS. Compiled with its own flags: not every CPU with AVX-512 has it.
#include <immintrin.h>

#include "roof_instructions.h"

namespace headrace {

int64_t multiply_bf16_avx512(int64_t rounds, float* result) {
  constexpr int kChains = 12, kUnroll = 16;
  __m512 chain[kChains];
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(result[0]), _mm512_set1_ps(result[0]));
  __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(result[1]), _mm512_set1_ps(result[1]));
  for (int c = 0; c < kChains; ++c) chain[c] = _mm512_set1_ps(static_cast<float>(c));
  for (int64_t r = 0; r < rounds; ++r)
    for (int u = 0; u < kUnroll; ++u)
      for (int c = 0; c < kChains; ++c) chain[c] = _mm512_dpbf16_ps(chain[c], a, b);
  for (int c = 1; c < kChains; ++c) chain[0] = _mm512_add_ps(chain[0], chain[c]);
  float sums[16];
  _mm512_storeu_ps(sums, chain[0]);
  result[2] = sums[0];
  return 2 * rounds * kUnroll * kChains * 32;
}

}  // namespace headrace
