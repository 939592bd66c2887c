// Measuring this machine's roofs: which probes run here, and the seconds they take on a pool.
#pragma once
#include "isa.h"
#include "roof_instructions.h"
#include "runtime.h"

namespace headrace {

// Names of the probes this CPU can run at a level: "fp32", "int8", "bf16_avx512", "bf16_amx", "int8_amx".
std::vector<std::string> multiply_probes(Isa isa);

// Writes to every page, each thread to the part it will read: the memory is real and near that thread's core.
void touch_pages(Pool& pool, const TensorRef& memory);
// Seconds to read the first num_bytes of memory `passes` times, with all threads of the pool.
double read_seconds(Pool& pool, Isa isa, const TensorRef& memory, int64_t num_bytes, int64_t passes);
struct Multiplied {
  int64_t operations;
  double seconds;
};
Multiplied multiply_seconds(Pool& pool, Isa isa, const std::string& probe, int64_t rounds);

}  // namespace headrace
