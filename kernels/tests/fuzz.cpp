// One round of hostile input: bytes -> rows of a sparse matrix, or a packed buffer, that may be anything.
//
// What the check lets through is packed in every form and multiplied, and must give the sums of a plain loop; what it
// refuses must really be wrong. A packed buffer that was cut or overwritten must be refused or harmless. Memory comes in
// exact sizes, so that AddressSanitizer sees one byte too many. Runs under libFuzzer, or under mutate.cpp.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../few.h"
#include "../few_weight.h"
#include "../prunella.h"
#include "../prunella_dot.h"
#include "../prunella_few.h"

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "broken promise: %s (tier %s)\n", what, prunella_tier());
  std::abort();
}

void must(bool held, const char* what) {
  if (!held) fail(what);
}

// The input, read front to back; behind its end everything is 0.
struct Bytes {
  const uint8_t* data;
  size_t left;

  uint64_t next(int count) {
    uint64_t value = 0;
    for (int i = 0; i < count && left; i++, data++, left--) value |= uint64_t(*data) << (8 * i);
    return value;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(next(2)) % limit; }
};

// Exactly as many elements as were asked for, so that the one behind them is poisoned.
template <class T>
struct Exact {
  std::unique_ptr<T[]> memory;
  int64_t size;
  explicit Exact(int64_t n) : memory(new T[static_cast<size_t>(n)]()), size(n) {}
  T& operator[](int64_t i) { return memory[static_cast<size_t>(i)]; }
  T* get() { return memory.get(); }
};

struct Rows {
  int64_t m, k;
  Exact<int64_t> starts, columns;
  Exact<float> values;
};

float number(Bytes& in) {
  const uint64_t kind = in.next(1);
  if (kind == 255) return NAN;
  if (kind == 254) return INFINITY;
  if (kind == 253) return 1e-40f;
  return (static_cast<float>(kind) - 126.0f) / 32.0f;
}

// Well-formed rows of k columns, whose density and places come from the input.
Rows good_rows(Bytes& in, int64_t k) {
  const int64_t m = in.below(9);
  const uint64_t keep = in.next(1);
  uint64_t state = in.next(4) * 2 + 1;
  std::vector<int64_t> starts(1, 0), columns;
  for (int64_t row = 0; row < m; row++) {
    for (int64_t column = 0; column < k; column++) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      if ((state >> 33) % 256 < keep) columns.push_back(column);
    }
    starts.push_back(static_cast<int64_t>(columns.size()));
  }
  Rows rows{m, k, Exact<int64_t>(m + 1), Exact<int64_t>(static_cast<int64_t>(columns.size())),
            Exact<float>(static_cast<int64_t>(columns.size()))};
  std::memcpy(rows.starts.get(), starts.data(), starts.size() * sizeof(int64_t));
  if (!columns.empty()) std::memcpy(rows.columns.get(), columns.data(), columns.size() * sizeof(int64_t));
  for (int64_t p = 0; p < rows.values.size; p++) rows.values[p] = static_cast<float>(p % 61 - 30) / 16.0f;
  for (int64_t some = in.below(4); some > 0 && rows.values.size; some--) rows.values[in.below(rows.values.size)] = number(in);
  return rows;
}

Rows good_rows(Bytes& in) {
  const int64_t k = in.below(in.next(1) % 64 ? 150 : 3000);
  return good_rows(in, k);
}

// A number instead of `now`, often just across the `limit`.
int64_t hostile(Bytes& in, int64_t now, int64_t limit) {
  switch (in.next(1) % 8) {
    case 0: return static_cast<int64_t>(in.next(8));
    case 1: return -static_cast<int64_t>(in.next(1));
    case 2: return INT64_MIN;
    case 3: return INT64_MAX;
    case 4: return static_cast<int64_t>(static_cast<uint64_t>(now) + 1);
    case 5: return static_cast<int64_t>(static_cast<uint64_t>(now) - 1);
    case 6: return limit;
    default: return limit - 1;
  }
}

void spoil(Bytes& in, Rows& rows) {
  for (int64_t times = 1 + in.below(3); times > 0; times--) {
    const bool starts = in.next(1) % 2 || rows.columns.size == 0;
    Exact<int64_t>& some = starts ? rows.starts : rows.columns;
    int64_t& one = some[in.next(1) % 4 ? in.below(some.size) : some.size - 1];
    one = hostile(in, one, starts ? rows.columns.size : rows.k);
  }
}

template <class T>
void spoil_one(Bytes& in, void* section, int64_t count, int64_t limit) {
  if (!count) return;
  T& one = static_cast<T*>(section)[in.below(count)];
  one = static_cast<T>(hostile(in, static_cast<int64_t>(one), limit));
}

// Two bits of a word change places or flip: often the count of the row stays what it was.
void spoil_mask(Bytes& in, uint64_t* mask, int64_t words) {
  if (!words) return;
  uint64_t& word = mask[in.below(words)];
  const uint64_t first = in.next(1) % 64, second = in.next(1) % 64;
  word ^= uint64_t(1) << first | uint64_t(1) << second;
}

void spoil_buffer(Bytes& in, void* data, int64_t length) {
  const prunella::FewView w = prunella::few_view(data);
  switch (in.next(1) % 5) {
    case 0: return spoil_one<int64_t>(in, data, 5, w.h.nonzeros);
    case 1: return spoil_one<int64_t>(in, const_cast<int64_t*>(w.starts), w.h.rows + 1, w.h.nonzeros);
    case 2:
      if (w.h.kind == prunella::kCsr)
        return spoil_one<uint16_t>(in, const_cast<uint16_t*>(w.index), w.h.nonzeros, w.h.columns);
      return spoil_mask(in, const_cast<uint64_t*>(w.mask), w.h.rows * prunella::few_words(w.h.columns));
    case 3:
      if (w.h.value != prunella::kInt8) return;
      return spoil_one<int32_t>(in, const_cast<int32_t*>(w.sums), w.h.rows, 0);
    default: static_cast<uint8_t*>(data)[static_cast<int64_t>(in.next(4)) % length] = static_cast<uint8_t>(in.next(1));
  }
}

bool well_formed(Rows& rows) {
  if (rows.starts[0] != 0 || rows.starts[rows.m] != rows.columns.size) return false;
  for (int64_t i = 0; i < rows.m; i++)
    if (rows.starts[i] < 0 || rows.starts[i + 1] > rows.columns.size || rows.starts[i + 1] < rows.starts[i]) return false;
  for (int64_t i = 0; i < rows.m; i++)
    for (int64_t p = rows.starts[i]; p < rows.starts[i + 1]; p++)
      if (rows.columns[p] < 0 || rows.columns[p] >= rows.k || (p > rows.starts[i] && rows.columns[p] <= rows.columns[p - 1]))
        return false;
  return true;
}

struct Product {
  int64_t tokens;
  Exact<float> x, y;
  Exact<double> wanted, size;
};

Product product(Bytes& in, Rows& rows, bool odd) {
  const int64_t tokens = in.below(11);
  Product out{tokens, Exact<float>(tokens * rows.k), Exact<float>(tokens * rows.m), Exact<double>(tokens * rows.m),
              Exact<double>(tokens * rows.m)};
  for (int64_t i = 0; i < out.x.size; i++) out.x[i] = static_cast<float>(i * 7 % 97 - 48) / 32.0f;
  if (odd && out.x.size) out.x[in.below(out.x.size)] = number(in);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < rows.m; i++)
      for (int64_t p = rows.starts[i]; p < rows.starts[i + 1]; p++) {
        const double one = double(rows.values[p]) * out.x[t * rows.k + rows.columns[p]];
        out.wanted[t * rows.m + i] += one;
        out.size[t * rows.m + i] += std::fabs(one);
      }
  return out;
}

void compare(Product& out, double relative, double absolute) {
  for (int64_t i = 0; i < out.y.size; i++) {
    const double wanted = out.wanted[i], got = out.y[i];
    if (std::isnan(wanted))
      must(std::isnan(got), "NaN of x or of a weight reaches the sum");
    else if (std::isinf(wanted))
      must(got == wanted, "infinity reaches the sum");
    else
      must(std::fabs(got - wanted) <= relative * out.size[i] + absolute, "the sum is that of a plain loop");
    out.y[i] = -77.0f;
  }
}

bool finite(Exact<float>& values) {
  for (int64_t i = 0; i < values.size; i++)
    if (!std::isfinite(values[i])) return false;
  return true;
}

// int8 rounds to 127 steps of the largest number: of a row, and of a token.
double int8_slack(Rows& rows, Product& out) {
  double weight = 0.0, x = 0.0;
  for (int64_t p = 0; p < rows.values.size; p++) weight = std::fmax(weight, std::fabs(rows.values[p]));
  for (int64_t i = 0; i < out.x.size; i++)
    if (std::isfinite(out.x[i])) x = std::fmax(x, std::fabs(out.x[i]));
  return double(rows.k) * weight * x * 1.1 / 127.0;
}

void try_few(Bytes& in, Rows& rows, Product& out, int32_t threads) {
  const int32_t kind = static_cast<int32_t>(in.next(1) % 8) % 3 - (in.next(1) % 16 == 0);
  const int32_t precision = static_cast<int32_t>(in.next(1) % 16) % 4 - (in.next(1) % 16 == 0);
  const bool there = kind >= 0 && kind <= 1 && precision >= 0 && precision <= 2 - kind;
  prunella_few* packed = nullptr;
  const int code = prunella_few_pack(rows.m, rows.k, rows.columns.size, rows.starts.get(), rows.columns.get(),
                                     rows.values.get(), kind, precision, &packed);
  const bool accepted = there && (precision != PRUNELLA_INT8 || finite(rows.values));
  must((code == PRUNELLA_OK) == accepted, "a form is packed if there is one");
  if (code) return;
  must(prunella::few_check(packed->data, packed->bytes) == PRUNELLA_OK, "what was packed passes its check");
  must(prunella_few_linear(packed, out.x.get(), out.tokens, nullptr, nullptr, 0, 0, threads, out.y.get()) == 0, "it runs");
  const double slack = precision == PRUNELLA_INT8 ? int8_slack(rows, out) : 0.0;
  compare(out, precision == PRUNELLA_BF16 ? 0.01 : 1e-5, 1e-30 + slack);
  prunella_few_free(packed);
}

void try_many(Bytes& in, Rows& rows, Product& out, int32_t threads) {
  static const int32_t sides[] = {1, 2, 4};
  const int32_t kind = static_cast<int32_t>(in.next(1) % 6), side = sides[in.next(1) % 3], tile = static_cast<int32_t>(in.next(1) % 9);
  const int32_t depth = 1 + static_cast<int32_t>(in.below(600)), half = in.next(1) % 4 == 0;
  prunella_many* packed = nullptr;
  if (prunella_many_pack(rows.m, rows.k, rows.columns.size, rows.starts.get(), rows.columns.get(), rows.values.get(), kind,
                         side, depth, half, &packed))
    return;
  const int done = prunella_many_linear(packed, out.x.get(), out.tokens, nullptr, nullptr, 0, 0, tile, threads, out.y.get());
  if (done == PRUNELLA_OK && (kind <= 1 || kind == 5 || finite(out.x))) compare(out, half ? 0.01 : 1e-5, 1e-30);
  prunella_many_free(packed);
}

// As the header defines it: the codes of x, and sums of integers.
void expect_dot(Rows& rows, Product& out, float scale, int32_t zero) {
  for (int64_t t = 0; t < out.tokens; t++) {
    float low = 0.0f, high = 0.0f;
    for (int64_t c = 0; c < rows.k; c++) low = std::fmin(low, out.x[t * rows.k + c]), high = std::fmax(high, out.x[t * rows.k + c]);
    const float mine = scale > 0.0f ? scale : high / 255.0f - low / 255.0f, inverse = mine > 1e-30f ? 1.0f / mine : 0.0f;
    const float middle = scale > 0.0f ? float(zero) : std::nearbyint(-low * inverse);
    for (int64_t i = 0; i < rows.m; i++) {
      float most = 0.0f;
      for (int64_t p = rows.starts[i]; p < rows.starts[i + 1]; p++) most = std::fmax(most, std::fabs(rows.values[p]));
      const float row = most / 127.0f;
      int64_t sum = 0;
      for (int64_t p = rows.starts[i]; p < rows.starts[i + 1]; p++) {
        const float code = std::nearbyint(out.x[t * rows.k + rows.columns[p]] * inverse) + middle;
        const float value = row > 0.0f ? std::nearbyint(rows.values[p] / row) : 0.0f;
        sum += int64_t(std::fmax(-127.0f, std::fmin(127.0f, value))) * int64_t(std::fmax(0.0f, std::fmin(255.0f, code)) - middle);
      }
      out.wanted[t * rows.m + i] = double(sum) * double(row) * double(mine);
      out.size[t * rows.m + i] = std::fabs(out.wanted[t * rows.m + i]);
    }
  }
}

void try_dot(Bytes& in, Rows& rows, Product& out, int32_t threads) {
  const int32_t side = static_cast<int32_t>(in.next(1) % 6), tile = static_cast<int32_t>(in.next(1) % 6);
  const int32_t depth = in.next(1) % 8 ? 4 + 4 * static_cast<int32_t>(in.below(200)) : static_cast<int32_t>(hostile(in, 4, 65536));
  prunella_dot* packed = nullptr;
  const int code = prunella_dot_pack(rows.m, rows.k, rows.columns.size, rows.starts.get(), rows.columns.get(),
                                     rows.values.get(), side, depth, &packed);
  const bool there = (side == 1 || side == 2 || side == 4) && depth >= 4 && depth % 4 == 0 && depth <= 65536;
  must((code == PRUNELLA_OK) == (there && finite(rows.values)), "int8 blocks are packed if there are such");
  if (code) return;
  const float scale = in.next(1) % 2 ? 0.0f : number(in);
  const int32_t zero = static_cast<int32_t>(in.next(1)) - (in.next(1) % 8 == 0);
  const int done = prunella_dot_linear(packed, out.x.get(), out.tokens, nullptr, nullptr, 0, scale, zero, tile, threads, out.y.get());
  const bool valid = tile >= 1 && tile <= 4 && scale >= 0.0f && std::isfinite(scale) &&
                     (scale == 0.0f || (std::isfinite(1.0f / scale) && zero >= 0));
  must((done == PRUNELLA_BAD_ARGUMENT) == !valid, "a call that no kernel has is refused");
  if (done == PRUNELLA_ODD_INPUT) must(!finite(out.x), "only an odd number is refused");
  if (done == PRUNELLA_OK && out.y.size) {
    must(finite(out.x), "an odd number is refused");
    expect_dot(rows, out, scale, zero);
    compare(out, 1e-6, 1e-30);
  }
  prunella_dot_free(packed);
}

// The sums of a convolution by a plain loop; x and y in the layout of the image.
Product product_of_patches(Bytes& in, Rows& rows, const prunella_image& g, int64_t high, int64_t wide, bool odd) {
  const int64_t plane = high * wide, size = g.batch * rows.m * plane, pixels = g.height * g.width;
  Product out{g.batch * plane, Exact<float>(g.batch * g.channels * pixels), Exact<float>(size), Exact<double>(size),
              Exact<double>(size)};
  for (int64_t i = 0; i < out.x.size; i++) out.x[i] = static_cast<float>(i * 7 % 97 - 48) / 32.0f;
  if (odd && out.x.size) out.x[in.below(out.x.size)] = number(in);
  for (int64_t b = 0; b < g.batch; b++)
    for (int64_t i = 0; i < rows.m; i++)
      for (int64_t at = 0; at < plane; at++)
        for (int64_t p = rows.starts[i]; p < rows.starts[i + 1]; p++) {
          const int64_t tap = rows.columns[p] % (int64_t(g.kernel_h) * g.kernel_w);
          const int64_t c = rows.columns[p] / (int64_t(g.kernel_h) * g.kernel_w);
          const int64_t y = at / wide * g.stride_h + tap / g.kernel_w * g.dilation_h - g.pad_h;
          const int64_t x = at % wide * g.stride_w + tap % g.kernel_w * g.dilation_w - g.pad_w;
          const bool inside = y >= 0 && y < g.height && x >= 0 && x < g.width;
          const int64_t from = g.last ? (y * g.width + x) * g.channels + c : c * pixels + y * g.width + x;
          const double one = double(rows.values[p]) * (inside ? out.x[b * g.channels * pixels + from] : 0.0f);
          const int64_t to = b * rows.m * plane + (g.last ? at * rows.m + i : i * plane + at);
          out.wanted[to] += one;
          out.size[to] += std::fabs(one);
        }
  return out;
}

void round_of_images(Bytes& in) {
  static const int32_t sides[] = {1, 2, 4};
  const auto small = [&](int limit) { return 1 + static_cast<int32_t>(in.below(limit)); };
  prunella_image g{in.below(12), in.below(13), in.below(21), in.below(3), small(4), small(4), small(3), small(3),
                   small(4) - 1, small(4) - 1, small(2), small(2), static_cast<int32_t>(in.next(1) % 2)};
  if (in.next(1) % 16 == 0) g.width *= 5;
  Rows rows = good_rows(in, g.channels * g.kernel_h * g.kernel_w);
  const int32_t kind = static_cast<int32_t>(in.next(1) % 6), side = sides[in.next(1) % 3], tile = static_cast<int32_t>(in.next(1) % 9);
  const int32_t depth = 1 + static_cast<int32_t>(in.below(in.next(1) % 2 ? 40 : 600)), half = in.next(1) % 4 == 0;
  const uint64_t how = in.next(1);
  prunella_many* packed = nullptr;
  if (prunella_many_pack(rows.m, rows.k, rows.columns.size, rows.starts.get(), rows.columns.get(), rows.values.get(), kind,
                         side, depth, half, &packed))
    return;
  const int64_t tall = g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t long_ = g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1;
  const int64_t high = tall < 0 ? 0 : tall / g.stride_h + 1, wide = long_ < 0 ? 0 : long_ / g.stride_w + 1;
  Product out = product_of_patches(in, rows, g, high, wide, how % 4 == 0);
  const int32_t strict = how / 4 % 2, threads = how / 8 % 8 == 0 ? 3 : 1;
  for (int times = 0; times < 2; times++) {  // the second time with what was kept of the first
    const int done = prunella_many_conv(packed, &g, out.x.get(), nullptr, nullptr, 0, strict, tile, threads, out.y.get());
    if (done == PRUNELLA_ODD_INPUT) must(strict && !finite(out.x), "only an odd number is refused");
    if (done == PRUNELLA_OK && high && wide && (kind <= 1 || kind == 5 || finite(out.x))) compare(out, half ? 0.01 : 1e-5, 1e-30);
  }
  for (int64_t i = 0; i < out.y.size; i++) out.wanted[i] *= 2.0;  // what follows adds the same to where it is
  const prunella_step first{packed, &g, nullptr, 0, 0, 0, 0, -1, 1, 0, tile}, second{packed, &g, nullptr, 0, 0, 0, 0, 1, 1, 0, tile};
  const prunella_step steps[] = {first, second};
  float* const places[] = {out.x.get(), out.y.get()};
  const int done = prunella_many_chain(steps, 2, places, threads);
  if (done == PRUNELLA_ODD_INPUT) must(!finite(out.x), "only an odd number ends a chain");
  if (done == PRUNELLA_OK && high && wide && (kind <= 1 || kind == 5 || finite(out.x))) compare(out, half ? 0.01 : 1e-5, 1e-30);
  prunella_many_free(packed);
}

void round_of_rows(Bytes& in) {
  const uint64_t how = in.next(1);
  Rows rows = good_rows(in);
  if (how % 2) spoil(in, rows);
  const bool right = well_formed(rows);
  const int code = prunella_check(rows.m, rows.k, rows.columns.size, rows.starts.get(), rows.columns.get());
  must((code == PRUNELLA_OK) == right, "the check refuses what is wrong, and only that");
  if (right) {
    Product out = product(in, rows, how % 4 == 0);
    const int32_t threads = how % 64 == 0 ? 3 : 1;
    try_few(in, rows, out, threads);
    try_many(in, rows, out, threads);
    try_dot(in, rows, out, threads);
    return;
  }
  prunella_few* few = nullptr;
  prunella_many* many = nullptr;
  const auto* starts = rows.starts.get();
  const auto* columns = rows.columns.get();
  must(prunella_few_pack(rows.m, rows.k, rows.columns.size, starts, columns, rows.values.get(), 0, 0, &few) && !few,
       "nothing is packed from wrong rows");
  must(prunella_many_pack(rows.m, rows.k, rows.columns.size, starts, columns, rows.values.get(), 0, 4, 64, 0, &many) && !many,
       "nothing is packed from wrong rows");
}

// A packed buffer with bytes changed, or cut: refused, or run without touching anything outside.
void round_of_buffer(Bytes& in) {
  Rows rows = good_rows(in);
  const int32_t kind = static_cast<int32_t>(in.next(1) % 2), precision = static_cast<int32_t>(in.next(1)) % (3 - kind);
  for (int64_t p = 0; p < rows.values.size; p++)
    if (!std::isfinite(rows.values[p])) rows.values[p] = 1.0f;
  prunella_few* packed = nullptr;
  must(prunella_few_pack(rows.m, rows.k, rows.columns.size, rows.starts.get(), rows.columns.get(), rows.values.get(), kind,
                         precision, &packed) == 0, "good rows are packed");
  const int64_t full = packed->bytes, length = in.next(1) % 4 ? full : static_cast<int64_t>(in.next(4)) % (full + 1);
  void* data = nullptr;
  if (posix_memalign(&data, 64, static_cast<size_t>(length ? length : 1))) std::abort();
  std::memcpy(data, packed->data, static_cast<size_t>(length));
  prunella_few_free(packed);
  for (int64_t times = in.below(3); times > 0 && prunella::few_check(data, length) == PRUNELLA_OK; times--)
    spoil_buffer(in, data, length);
  prunella_few taken{data, length};
  const prunella::FewHeader& h = *static_cast<prunella::FewHeader*>(data);
  // A header without rows may name any number of columns, and x for so many is not to be had.
  if (prunella::few_check(data, length) == PRUNELLA_OK && h.columns < 1 << 20) {
    must(length == full, "a cut buffer is refused");
    const int64_t tokens = 1 + in.below(8);
    Exact<float> x(tokens * h.columns), y(tokens * h.rows);
    if (x.size && in.next(1) % 2) x[in.below(x.size)] = NAN;
    must(prunella_few_linear(&taken, x.get(), tokens, nullptr, nullptr, 1, 0, 1, y.get()) == 0, "a checked buffer runs");
  }
  std::free(data);
}

void choose_tier(uint64_t number) {
  std::vector<char> names(prunella_tiers(), prunella_tiers() + std::strlen(prunella_tiers()) + 1);
  std::vector<const char*> each;
  for (char* name = std::strtok(names.data(), ","); name; name = std::strtok(nullptr, ",")) each.push_back(name);
  must(prunella_use(each[number % each.size()]) == PRUNELLA_OK, "a tier that is named can be used");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  choose_tier(in.next(1));
  switch (in.next(1) % 4) {
    case 0: round_of_buffer(in); break;
    case 1: round_of_images(in); break;
    default: round_of_rows(in);
  }
  return 0;
}
