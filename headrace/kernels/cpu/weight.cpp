// GGUF blocks to integer codes, codes to panels, and both back to floats. Written for reading: load time only.
#define HEADRACE_ISA plain
#include "weight.h"

#include <algorithm>
#include <stdexcept>

#include "simd.h"

namespace headrace {

using plain::bf16_to_float;
using plain::half_to_float;

namespace {

const FormatInfo kFormats[kNumFormats] = {
    // name    len bytes bits zero table group sub min
    {"F32", 1, 4, 0, 0, false, 1, 1, false},
    {"F16", 1, 2, 0, 0, false, 1, 1, false},
    {"BF16", 1, 2, 0, 0, false, 1, 1, false},
    {"Q4_0", 32, 18, 4, 8, false, 32, 32, false},
    {"Q4_1", 32, 20, 4, 0, false, 32, 32, true},
    {"Q5_0", 32, 22, 5, 16, false, 32, 32, false},
    {"Q5_1", 32, 24, 5, 0, false, 32, 32, true},
    {"Q8_0", 32, 34, 8, 128, false, 32, 32, false},
    {"Q2_K", 256, 84, 2, 0, false, 256, 16, true},
    {"Q3_K", 256, 110, 3, 4, false, 256, 16, false},
    {"Q4_K", 256, 144, 4, 0, false, 256, 32, true},
    {"Q5_K", 256, 176, 5, 0, false, 256, 32, true},
    {"Q6_K", 256, 210, 6, 32, false, 256, 16, false},
    {"IQ4_NL", 32, 18, 4, 128, true, 32, 32, false},
    {"IQ4_XS", 256, 136, 4, 128, true, 256, 32, false},
};

// One group of one row: w = scale * sub * (code - zero) - min * sub_min   (group 256)
//                       w = scale * (code - zero) + min                   (group 32)
struct Group {
  uint16_t scale = 0, min = 0;  // fp16 bits
  int8_t sub[16] = {}, sub_min[16] = {};
  uint8_t codes[256];
};

uint16_t half_at(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }

void nibbles_32(const uint8_t* qs, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = qs[i] & 15;
    codes[i + 16] = qs[i] >> 4;
  }
}

// Bit i of the byte as byte i: 0 or 1.
uint64_t spread_bits(uint8_t bits) {
  uint64_t one_each = (bits * uint64_t{0x0101010101010101}) & 0x8040201008040201;
  return ((one_each + 0x7f7f7f7f7f7f7f7f) >> 7) & 0x0101010101010101;
}

void fifth_bits_32(const uint8_t* qh, uint8_t* codes) {
  for (int i = 0; i < 4; ++i) {
    uint64_t eight;
    memcpy(&eight, codes + 8 * i, 8);
    eight |= spread_bits(qh[i]) << 4;
    memcpy(codes + 8 * i, &eight, 8);
  }
}

// Six-bit scales and mins of Q4_K and Q5_K: four whole in the low bits, four split over two bytes.
void six_bit_pairs(const uint8_t* s, Group& g) {
  for (int j = 0; j < 8; ++j) {
    g.sub[j] = static_cast<int8_t>(j < 4 ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4));
    g.sub_min[j] = static_cast<int8_t>(j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 6) << 4));
  }
}

// The loops over 32 bytes below are whole vectors to a compiler: a start waits for them.
void two_bits_256(const uint8_t* qs, uint8_t* codes) {
  for (int n = 0; n < 2; ++n)
    for (int part = 0; part < 4; ++part)
      for (int l = 0; l < 32; ++l) codes[128 * n + 32 * part + l] = (qs[32 * n + l] >> (2 * part)) & 3;
}

void read_q2_k(const uint8_t* b, Group& g) {
  two_bits_256(b + 16, g.codes);
  for (int i = 0; i < 16; ++i) {
    g.sub[i] = b[i] & 15;
    g.sub_min[i] = static_cast<int8_t>(b[i] >> 4);
  }
  g.scale = half_at(b + 80);
  g.min = half_at(b + 82);
}

void read_q3_k(const uint8_t* b, Group& g) {
  two_bits_256(b + 32, g.codes);
  for (int part = 0; part < 8; ++part)
    for (int l = 0; l < 32; ++l) g.codes[32 * part + l] |= static_cast<uint8_t>(((b[l] >> part) & 1) << 2);
  const uint8_t* s = b + 96;
  for (int i = 0; i < 16; ++i) {
    int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
    int high = (s[8 + i % 4] >> (2 * (i / 4))) & 3;
    g.sub[i] = static_cast<int8_t>((low | (high << 4)) - 32);
  }
  g.scale = half_at(b + 108);
}

void read_q45_k(const uint8_t* b, Group& g, bool five) {
  g.scale = half_at(b);
  g.min = half_at(b + 2);
  six_bit_pairs(b + 4, g);
  const uint8_t *qh = b + 16, *qs = b + (five ? 48 : 16);
  for (int part = 0; part < 8; ++part) {
    const uint8_t* nibbles = qs + part / 2 * 32;
    uint8_t* codes = g.codes + 32 * part;
    for (int l = 0; l < 32; ++l) codes[l] = (nibbles[l] >> (4 * (part % 2))) & 15;
    if (!five) continue;
    for (int l = 0; l < 32; ++l) codes[l] |= static_cast<uint8_t>(((qh[l] >> part) & 1) << 4);
  }
}

void read_q6_k(const uint8_t* b, Group& g) {
  const uint8_t *ql = b, *qh = b + 128;
  for (int n = 0; n < 2; ++n)
    for (int part = 0; part < 4; ++part) {
      const uint8_t *lows = ql + 64 * n + part % 2 * 32, *highs = qh + 32 * n;
      uint8_t* codes = g.codes + 128 * n + 32 * part;
      for (int l = 0; l < 32; ++l)
        codes[l] = static_cast<uint8_t>(((lows[l] >> (part / 2 * 4)) & 15) | ((highs[l] >> (2 * part)) & 3) << 4);
    }
  for (int i = 0; i < 16; ++i) g.sub[i] = static_cast<int8_t>(b[192 + i]);
  g.scale = half_at(b + 208);
}

void read_iq4_xs(const uint8_t* b, Group& g) {
  g.scale = half_at(b);
  int high = half_at(b + 2);
  for (int j = 0; j < 8; ++j) {
    int low = (b[4 + j / 2] >> (4 * (j % 2))) & 15;
    g.sub[j] = static_cast<int8_t>((low | (((high >> (2 * j)) & 3) << 4)) - 32);
    nibbles_32(b + 8 + 16 * j, g.codes + 32 * j);
  }
}

Group read_group(WeightFormat format, const uint8_t* b) {
  Group g;
  switch (format) {
    case WeightFormat::Q4_0: case WeightFormat::IQ4_NL:
      g.scale = half_at(b);
      nibbles_32(b + 2, g.codes);
      break;
    case WeightFormat::Q4_1:
      g.scale = half_at(b);
      g.min = half_at(b + 2);
      nibbles_32(b + 4, g.codes);
      break;
    case WeightFormat::Q5_0:
      g.scale = half_at(b);
      nibbles_32(b + 6, g.codes);
      fifth_bits_32(b + 2, g.codes);
      break;
    case WeightFormat::Q5_1:
      g.scale = half_at(b);
      g.min = half_at(b + 2);
      nibbles_32(b + 8, g.codes);
      fifth_bits_32(b + 4, g.codes);
      break;
    case WeightFormat::Q8_0:
      g.scale = half_at(b);
      for (int i = 0; i < 32; ++i) g.codes[i] = b[2 + i] ^ 0x80;
      break;
    case WeightFormat::Q2_K: read_q2_k(b, g); break;
    case WeightFormat::Q3_K: read_q3_k(b, g); break;
    case WeightFormat::Q4_K: read_q45_k(b, g, false); break;
    case WeightFormat::Q5_K: read_q45_k(b, g, true); break;
    case WeightFormat::Q6_K: read_q6_k(b, g); break;
    case WeightFormat::IQ4_XS: read_iq4_xs(b, g); break;
    default: break;
  }
  return g;
}

// Where the parts of a packed group lie.
struct GroupLayout {
  int64_t min, sub, sub_min, codes, bytes;
  explicit GroupLayout(const FormatInfo& f) {
    int64_t subs = f.group == 256 ? f.group / f.sub * 16 : 0;
    min = 32;
    sub = min + (f.has_min ? 32 : 0);
    sub_min = sub + subs;
    codes = sub_min + (f.has_min ? subs : 0);
    bytes = codes + f.group / 32 * step_bytes(f.bits);
  }
};

void put_half(uint8_t* p, uint16_t h) {
  p[0] = static_cast<uint8_t>(h);
  p[1] = static_cast<uint8_t>(h >> 8);
}

// Lane `r` of one step: 32 codes into the planes, four codes (a word) at a time.
void put_step(int bits, const uint8_t* codes, int r, uint8_t* out) {
  uint32_t word[8];
  memcpy(word, codes, sizeof word);
  auto put = [&](int place, uint32_t value) { memcpy(out + place * 64 + r * 4, &value, 4); };
  if (bits == 8) {
    for (int i = 0; i < 8; ++i) put(i, word[i]);
    return;
  }
  if (bits >= 4) {
    for (int i = 0; i < 4; ++i) put(i, (word[i] & 0x0f0f0f0f) | (word[i + 4] & 0x0f0f0f0f) << 4);
    for (uint32_t& w : word) w = (w >> 4) & 0x0f0f0f0f;
    out += 256;
  }
  if (bits == 2 || bits == 3 || bits == 6) {
    for (int j = 0; j < 2; ++j) {
      uint32_t four = 0;
      for (int i = 0; i < 4; ++i) four |= (word[4 * j + i] & 0x03030303) << (2 * i);
      put(j, four);
    }
    for (uint32_t& w : word) w = (w >> 2) & 0x3f3f3f3f;
    out += 128;
  }
  if (bits == 3 || bits == 5) {
    uint32_t eight = 0;
    for (int i = 0; i < 8; ++i) eight |= (word[i] & 0x01010101) << i;
    put(0, eight);
  }
}

uint8_t get_code(int bits, const uint8_t* step, int r, int c) {
  int word = c / 4, byte = r * 4 + c % 4, code = 0, shift = 0;
  if (bits == 8) return step[word * 64 + byte];
  if (bits >= 4) {
    code = (step[(word % 4) * 64 + byte] >> (word / 4 * 4)) & 15;
    step += 256;
    shift = 4;
  }
  if (bits == 2 || bits == 3 || bits == 6) {
    code |= ((step[(word / 4) * 64 + byte] >> (2 * (word % 4))) & 3) << shift;
    step += 128;
    shift += 2;
  }
  if (bits == 3 || bits == 5) code |= ((step[byte] >> word) & 1) << shift;
  return static_cast<uint8_t>(code);
}

void put_group(const FormatInfo& f, const Group& g, int r, uint8_t* out) {
  GroupLayout at(f);
  put_half(out + 2 * r, g.scale);
  if (f.has_min) put_half(out + at.min + 2 * r, g.min);
  if (f.group == 256)
    for (int j = 0; j < f.group / f.sub; ++j) {
      out[at.sub + 16 * j + r] = static_cast<uint8_t>(g.sub[j]);
      if (f.has_min) out[at.sub_min + 16 * j + r] = static_cast<uint8_t>(g.sub_min[j]);
    }
  for (int s = 0; s < f.group / 32; ++s) put_step(f.bits, g.codes + 32 * s, r, out + at.codes + s * step_bytes(f.bits));
}

// The same for a 4-bit block of 32, which holds the words of a step as they are: byte i of its codes is columns i and
// 16 + i. Most files are made of these, and a start waits for them.
void put_nibble_block(const FormatInfo& f, const uint8_t* block, int r, uint8_t* out) {
  const uint8_t* codes = block + f.block_bytes - 16;
  memcpy(out + 2 * r, block, 2);
  if (f.has_min) memcpy(out + 32 + 2 * r, block + 2, 2);
  out += f.has_min ? 64 : 32;
  for (int i = 0; i < 4; ++i) memcpy(out + 64 * i + 4 * r, codes + 4 * i, 4);
}

Group get_group(const FormatInfo& f, const uint8_t* in, int r) {
  GroupLayout at(f);
  Group g;
  g.scale = half_at(in + 2 * r);
  if (f.has_min) g.min = half_at(in + at.min + 2 * r);
  if (f.group == 256)
    for (int j = 0; j < f.group / f.sub; ++j) {
      g.sub[j] = static_cast<int8_t>(in[at.sub + 16 * j + r]);
      if (f.has_min) g.sub_min[j] = static_cast<int8_t>(in[at.sub_min + 16 * j + r]);
    }
  for (int c = 0; c < f.group; ++c)
    g.codes[c] = get_code(f.bits, in + at.codes + c / 32 * step_bytes(f.bits), r, c % 32);
  return g;
}

// NOTE: this file is compiled without contraction: a fused multiply-add would not be GGUF's value.
void group_floats(const FormatInfo& f, const Group& g, float* out) {
  float scale = half_to_float(g.scale), min = half_to_float(g.min);
  for (int c = 0; c < f.group; ++c) {
    int code = (f.table ? kIq4Table[g.codes[c]] : g.codes[c]) - f.zero;
    float d = f.group == 256 ? scale * static_cast<float>(g.sub[c / f.sub]) : scale;
    float w = d * static_cast<float>(code);
    if (f.has_min) w = f.group == 256 ? w - min * static_cast<float>(g.sub_min[c / f.sub]) : w + min;
    out[c] = w;
  }
}

float float_at(WeightFormat format, const uint8_t* p) {
  if (format == WeightFormat::F16) return half_to_float(half_at(p));
  if (format == WeightFormat::BF16) return bf16_to_float(half_at(p));
  float v;
  memcpy(&v, p, 4);
  return v;
}

// Where element (row r of 16, column c) of a float panel lies.
inline int64_t float_offset(WeightFormat format, int r, int64_t c) {
  if (format == WeightFormat::BF16) return ((c / 2 * 16 + r) * 2 + c % 2) * 2;
  return (c * 16 + r) * (format == WeightFormat::F32 ? 4 : 2);
}

// A panel of floats, whose bytes only change places.
template <class T>
void pack_floats_of(WeightFormat format, const uint8_t* raw, int rows, int64_t cols, uint8_t* out) {
  constexpr int64_t kLine = 64 / sizeof(T);  // rows are often a power of two apart: a cache line stays for one visit only
  for (int64_t first = 0; first < cols; first += kLine)
    for (int r = 0; r < rows; ++r)
      for (int64_t c = first; c < std::min(cols, first + kLine); ++c)
        memcpy(out + float_offset(format, r, c), raw + (r * cols + c) * static_cast<int64_t>(sizeof(T)), sizeof(T));
}

void pack_floats(WeightFormat format, const uint8_t* raw, int rows, int64_t cols, uint8_t* out) {
  if (format == WeightFormat::F32) return pack_floats_of<uint32_t>(WeightFormat::F32, raw, rows, cols, out);
  if (format == WeightFormat::F16) return pack_floats_of<uint16_t>(WeightFormat::F16, raw, rows, cols, out);
  pack_floats_of<uint16_t>(WeightFormat::BF16, raw, rows, cols, out);
}

}  // namespace

// The sixteen levels of IQ4, plus 128.
const uint8_t kIq4Table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

const FormatInfo& format_info(WeightFormat format) { return kFormats[static_cast<int>(format)]; }

WeightFormat format_from_name(const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i)
    if (name == kFormats[i].name) return static_cast<WeightFormat>(i);
  throw std::invalid_argument("format: unknown weight format '" + name + "'");
}

int64_t panel_bytes(WeightFormat format, int64_t cols) {
  const FormatInfo& f = format_info(format);
  if (f.bits) return cols / f.group * GroupLayout(f).bytes;
  return format == WeightFormat::F32 ? cols * 64 : (cols + 1) / 2 * 64;
}

int64_t row_bytes(WeightFormat format, int64_t cols) {
  const FormatInfo& f = format_info(format);
  return cols / f.block_len * f.block_bytes;
}

void pack_panel(PackedWeight& weight, int64_t p, const uint8_t* raw) {
  const FormatInfo& f = format_info(weight.format);
  uint8_t* out = weight.panel(p);
  int rows = static_cast<int>(std::min<int64_t>(16, weight.rows - p * 16));
  if (!f.bits) return pack_floats(weight.format, raw, rows, weight.cols, out);
  int64_t stride = row_bytes(weight.format, weight.cols), group_bytes = GroupLayout(f).bytes;
  bool nibbles = f.bits == 4 && f.group == 32;
  for (int64_t g = 0; g < weight.cols / f.group; ++g, raw += f.block_bytes, out += group_bytes)
    for (int r = 0; r < rows; ++r)
      if (nibbles)
        put_nibble_block(f, raw + r * stride, r, out);
      else
        put_group(f, read_group(weight.format, raw + r * stride), r, out);
}

void dequantize_row(WeightFormat format, const uint8_t* raw, int64_t cols, float* out) {
  const FormatInfo& f = format_info(format);
  if (!f.bits) {
    for (int64_t c = 0; c < cols; ++c) out[c] = float_at(format, raw + c * f.block_bytes);
    return;
  }
  for (int64_t g = 0; g < cols / f.group; ++g) group_floats(f, read_group(format, raw + g * f.block_bytes), out + g * f.group);
}

void unpack_row(const PackedWeight& weight, int64_t row, float* out) {
  const FormatInfo& f = format_info(weight.format);
  const uint8_t* panel = weight.panel(row / 16);
  int r = static_cast<int>(row % 16);
  if (!f.bits) {
    for (int64_t c = 0; c < weight.cols; ++c) out[c] = float_at(weight.format, panel + float_offset(weight.format, r, c));
    return;
  }
  int64_t group_bytes = GroupLayout(f).bytes;
  for (int64_t g = 0; g < weight.cols / f.group; ++g) group_floats(f, get_group(f, panel + g * group_bytes, r), out + g * f.group);
}

}  // namespace headrace
