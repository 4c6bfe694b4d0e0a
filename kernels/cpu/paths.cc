// Which paths this CPU has.

#include <string.h>

#include "path.h"

#if defined(__x86_64__)
#include <cpuid.h>
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
#endif

const Path* find_path(const char* name) {
  const bool best = !*name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const struct {
    const Path* path;
    bool (*has)();
  } known[] = {
      {&kAvx512Vnni, has_avx512vnni},
      {&kAvx512Vnni256, has_avx512vnni},
      {&kAvxVnni, has_avxvnni},
      {&kAvx2, has_avx2},
  };
  for (const auto& candidate : known) {
    const bool wanted = best || !strcmp(name, candidate.path->name);
    if (wanted && candidate.has()) return candidate.path;
  }
#endif
  return best || !strcmp(name, kPortable.name) ? &kPortable : nullptr;
}

}  // namespace jaxcompress
