// Throughput of AMX tiles: four accumulators, which covers the latency of a tile product, operands in the other four.
// NOTE: assembly, not intrinsics: gcc 12 tells the compiler neither that a tile load reads memory nor that the tile
// configuration is 64 bytes long, and drops the stores that filled them. Each probe is one block with a memory clobber.
#include "roof_instructions.h"

namespace headrace {
namespace {

#if defined(__x86_64__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

constexpr int64_t kProductsPerRound = 16;

#define HEADRACE_FOUR_PRODUCTS(product)       \
  product " %%tmm6, %%tmm4, %%tmm0\n\t"       \
  product " %%tmm7, %%tmm4, %%tmm1\n\t"       \
  product " %%tmm6, %%tmm5, %%tmm2\n\t"       \
  product " %%tmm7, %%tmm5, %%tmm3\n\t"

#define HEADRACE_TILE_PROBE(product)                                                             \
  asm volatile(                                                                                  \
      "ldtilecfg (%[config])\n\t"                                                                \
      "tilezero %%tmm0\n\t tilezero %%tmm1\n\t tilezero %%tmm2\n\t tilezero %%tmm3\n\t"          \
      "tileloadd (%[operand],%[stride],1), %%tmm4\n\t"                                           \
      "tileloadd (%[operand],%[stride],1), %%tmm5\n\t"                                           \
      "tileloadd (%[operand],%[stride],1), %%tmm6\n\t"                                           \
      "tileloadd (%[operand],%[stride],1), %%tmm7\n\t"                                           \
      "1:\n\t"                                                                                   \
      HEADRACE_FOUR_PRODUCTS(product) HEADRACE_FOUR_PRODUCTS(product)                            \
      HEADRACE_FOUR_PRODUCTS(product) HEADRACE_FOUR_PRODUCTS(product)                            \
      "dec %[rounds]\n\t"                                                                        \
      "jnz 1b\n\t"                                                                               \
      "tilestored %%tmm0, (%[sums],%[stride],1)\n\t"                                             \
      "tilerelease\n\t"                                                                          \
      : [rounds] "+r"(rounds)                                                                    \
      : [config] "r"(&config), [operand] "r"(operand), [sums] "r"(sums), [stride] "r"(int64_t{64}) \
      : "memory", "cc")

#endif

}  // namespace

#if defined(__x86_64__)

int64_t multiply_bf16_amx(int64_t rounds, float* result) {
  TileConfig config;
  alignas(64) uint16_t operand[16 * 32];
  alignas(64) float sums[16 * 16];
  for (uint16_t& value : operand) value = 0x3f80;  // 1.0
  int64_t products = kProductsPerRound * rounds;
  HEADRACE_TILE_PROBE("tdpbf16ps");
  result[2] = sums[0];
  return products * 2 * 16 * 16 * 32;
}

int64_t multiply_int8_amx(int64_t rounds, float* result) {
  TileConfig config;
  alignas(64) int8_t operand[16 * 64];
  alignas(64) int32_t sums[16 * 16];
  for (int8_t& value : operand) value = 1;
  int64_t products = kProductsPerRound * rounds;
  HEADRACE_TILE_PROBE("tdpbssd");
  result[2] = static_cast<float>(sums[0]);
  return products * 2 * 16 * 16 * 64;
}

#endif

}  // namespace headrace
