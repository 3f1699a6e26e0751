// Without libFuzzer: inputs from a seed, half of them fresh, half of them earlier ones with a few bytes changed.
//
//   fuzz -max_total_time=SECONDS -seed=NUMBER     as libFuzzer is called; says how many inputs were tried
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

unsigned long long seed, number;

void say_where(int) {
  std::fprintf(stderr, "seed %llu, input %llu\n", seed, number);
  std::_Exit(1);
}

std::vector<uint8_t> fresh(std::mt19937_64& random) {
  std::vector<uint8_t> bytes(random() % 96);
  for (uint8_t& one : bytes) one = static_cast<uint8_t>(random());
  return bytes;
}

std::vector<uint8_t> changed(std::vector<uint8_t> bytes, std::mt19937_64& random) {
  for (uint64_t times = 1 + random() % 4; times && !bytes.empty(); times--) {
    uint8_t& one = bytes[random() % bytes.size()];
    one = random() % 2 ? static_cast<uint8_t>(random()) : static_cast<uint8_t>(one ^ 1u << random() % 8);
  }
  if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 1));
  return bytes;
}

// The number of an option -name=number, or `otherwise`.
unsigned long long option(int count, char** given, const char* name, unsigned long long otherwise) {
  for (int i = 1; i < count; i++)
    if (!std::strncmp(given[i], name, std::strlen(name))) otherwise = std::strtoull(given[i] + std::strlen(name), nullptr, 10);
  return otherwise;
}

}  // namespace

int main(int count, char** given) {
  const auto seconds = static_cast<double>(option(count, given, "-max_total_time=", 20));
  seed = option(count, given, "-seed=", 1);
  std::signal(SIGABRT, say_where);
  std::mt19937_64 random(seed);
  std::vector<std::vector<uint8_t>> kept;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    const bool again = !kept.empty() && random() % 2;
    const std::vector<uint8_t> bytes = again ? changed(kept[random() % kept.size()], random) : fresh(random);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    if (kept.size() < 256)
      kept.push_back(bytes);
    else
      kept[random() % kept.size()] = bytes;
    number++;
  }
  std::printf("%llu inputs, none broke a promise\n", number);
  return number ? 0 : 1;
}
