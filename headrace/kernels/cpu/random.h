// Counter-based random numbers: the n-th draw of a seed is computed from (seed, n), nothing is kept between draws.
// Philox 4x32-10: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include <cstdint>

namespace headrace {

struct Philox {
  uint32_t word[4];
};

inline Philox philox(Philox counter, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t{0xD2511F53u} * counter.word[0], b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key_low, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key_high, static_cast<uint32_t>(a)}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1), a multiple of 2^-53: key = seed, counter = (draw, 0), the first 53 bits of the result.
inline double uniform(uint64_t seed, uint64_t draw) {
  Philox r = philox({{static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32), 0, 0}},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  uint64_t bits = (uint64_t{r.word[0]} << 32 | r.word[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace headrace
