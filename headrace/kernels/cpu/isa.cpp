// Reads CPUID and XCR0 once; asks Linux for permission to use AMX tiles.
#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headrace {
namespace {

#if defined(__x86_64__)

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf leaf(unsigned function, unsigned index = 0) {
  Leaf l;
  if (!__get_cpuid_count(function, index, &l.eax, &l.ebx, &l.ecx, &l.edx)) return Leaf{};
  return l;
}

bool bit(unsigned word, int position) { return (word >> position) & 1u; }

unsigned long long xcr0() {
  if (!bit(leaf(1).ecx, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to processes that ask for it.
bool amx_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_avx2() {
  Leaf one = leaf(1), seven = leaf(7);
  bool state = (xcr0() & 0x6) == 0x6;
  return state && bit(one.ecx, 12) && bit(one.ecx, 29) && bit(seven.ebx, 5);  // FMA, F16C, AVX2
}

bool has_avx512() {
  Leaf seven = leaf(7);
  bool state = (xcr0() & 0xe6) == 0xe6;
  bool foundation = bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);
  return state && foundation && bit(seven.ecx, 1) && bit(seven.ecx, 11);  // VBMI, VNNI
}

bool has_avx512_bf16() { return bit(leaf(7, 1).eax, 5); }

bool has_amx() {
  Leaf seven = leaf(7);
  bool state = (xcr0() & 0x60000) == 0x60000;
  bool tiles = bit(seven.edx, 24) && bit(seven.edx, 22) && bit(seven.edx, 25);  // TILE, BF16, INT8
  return state && tiles && amx_permitted();
}

#endif

Isa detect() {
#if defined(__x86_64__)
  if (!has_avx2()) return Isa::portable;
  if (!has_avx512()) return Isa::avx2;
  if (!has_avx512_bf16()) return Isa::avx512;
  return has_amx() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"};
  return names[static_cast<int>(isa)];
}

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(Isa::amx_emulated); ++i)
    if (name == isa_name(static_cast<Isa>(i))) return static_cast<Isa>(i);
  throw std::invalid_argument("isa: expected portable, avx2, avx512, avx512_bf16 or amx, got '" + name + "'");
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

std::vector<std::string> cpu_flags() {
  std::vector<std::string> flags;
#if defined(__x86_64__)
  Leaf one = leaf(1), seven = leaf(7), seven_one = leaf(7, 1);
  auto add = [&](bool present, const char* name) {
    if (present) flags.push_back(name);
  };
  add(bit(seven.ebx, 5), "avx2");
  add(bit(one.ecx, 12), "fma");
  add(bit(one.ecx, 29), "f16c");
  add(bit(seven_one.eax, 4), "avx_vnni");
  add(bit(seven.ebx, 16), "avx512f");
  add(bit(seven.ebx, 30), "avx512bw");
  add(bit(seven.ecx, 1), "avx512_vbmi");
  add(bit(seven.ecx, 11), "avx512_vnni");
  add(bit(seven_one.eax, 5), "avx512_bf16");
  add(bit(seven.edx, 23), "avx512_fp16");
  add(bit(seven.edx, 24), "amx_tile");
  add(bit(seven.edx, 25), "amx_int8");
  add(bit(seven.edx, 22), "amx_bf16");
  add(bit(seven_one.eax, 21), "amx_fp16");
#endif
  return flags;
}

}  // namespace headrace
