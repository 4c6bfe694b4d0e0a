// Which paths this CPU has.

#include <string.h>

#include "path.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace jaxcompress {

extern const Path kPortable;

#if defined(__x86_64__)
extern const Path kAvx512Vnni, kAvxVnni, kAvx512Vnni256, kAvx2;

namespace {

bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Asked for by hand: not every compiler knows it by name.
bool has_avxvnni() {
  unsigned eax, ebx, ecx, edx;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

}  // namespace
#elif defined(__aarch64__)
extern const Path kNeonDot;

namespace {

bool has_dot_product() {
#if defined(__APPLE__)
  return true;  // all of Apple's 64-bit processors for computers
#elif defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}

}  // namespace
#endif

const Path* find_path(const char* name) {
  const bool best = !*name;
  const struct {
    const Path* path;
    bool (*has)();
  } known[] = {
#if defined(__x86_64__)
      {&kAvx512Vnni, has_avx512vnni},
      {&kAvx512Vnni256, has_avx512vnni},
      {&kAvxVnni, has_avxvnni},
      {&kAvx2, has_avx2},
#elif defined(__aarch64__)
      {&kNeonDot, has_dot_product},
#endif
      {&kPortable, [] { return true; }},
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const auto& candidate : known) {
    const bool wanted = best || !strcmp(name, candidate.path->name);
    if (wanted && candidate.has()) return candidate.path;
  }
  return nullptr;
}

}  // namespace jaxcompress
