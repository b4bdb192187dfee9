"""What this machine can do at most: DRAM read bandwidth and dot-product arithmetic, measured beside a figure.

    python bench/limits.py

A small C file is compiled with `cc -O2 -march=native`; the loops name their vectors and registers, because a
compiler left alone spills accumulators to the stack and halves the figure.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#include <stddef.h>

/* Sum 64-byte lines of [data, data + bytes): one sequential stream. */
uint64_t read_stream(const char *data, size_t bytes) {
#ifdef __AVX512F__
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    a = _mm512_xor_si512(a, _mm512_load_si512((const void *)(data + i)));
    b = _mm512_xor_si512(b, _mm512_load_si512((const void *)(data + i + 64)));
    c = _mm512_xor_si512(c, _mm512_load_si512((const void *)(data + i + 128)));
    d = _mm512_xor_si512(d, _mm512_load_si512((const void *)(data + i + 192)));
  }
  a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  return (uint64_t)_mm512_reduce_add_epi64(a);
#else
  __m256i a = _mm256_setzero_si256(), b = a;
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    a = _mm256_xor_si256(a, _mm256_load_si256((const void *)(data + i)));
    b = _mm256_xor_si256(b, _mm256_load_si256((const void *)(data + i + 32)));
  }
  a = _mm256_xor_si256(a, b);
  return (uint64_t)_mm256_extract_epi64(a, 0) ^ (uint64_t)_mm256_extract_epi64(a, 2);
#endif
}

/* 12 independent accumulators hide the latency; returns operations done. */
double bf16_dots(size_t rounds) {
#ifdef __AVX512BF16__
  register __m512 r0 = _mm512_setzero_ps(), r1 = r0, r2 = r0, r3 = r0, r4 = r0, r5 = r0;
  register __m512 r6 = r0, r7 = r0, r8 = r0, r9 = r0, r10 = r0, r11 = r0;
  __m512 x = _mm512_setzero_ps(), y = x;
  for (size_t i = 0; i < rounds; i++) {
#define DOT(r) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(r) : "v"(x), "v"(y))
    DOT(r0); DOT(r1); DOT(r2); DOT(r3); DOT(r4); DOT(r5); DOT(r6); DOT(r7); DOT(r8); DOT(r9); DOT(r10); DOT(r11);
  }
  return (double)rounds * 12 * 64;
#else
  return 0;
#endif
}

/* Products of 8-bit integers summed in 32 bits; a multiply and an add are two operations, as above. */
double int8_dots(size_t rounds) {
#if defined(__AVX512VNNI__)
#define W __m512i
#define NONE _mm512_setzero_si512()
#define BYTES 64
#elif defined(__AVXVNNI__)
#define W __m256i
#define NONE _mm256_setzero_si256()
#define BYTES 32
#endif
#ifdef BYTES
  register W r0 = NONE, r1 = r0, r2 = r0, r3 = r0, r4 = r0, r5 = r0;
  register W r6 = r0, r7 = r0, r8 = r0, r9 = r0, r10 = r0, r11 = r0;
  W x = NONE, y = x;
  for (size_t i = 0; i < rounds; i++) {
#ifdef __AVX512VNNI__
#define IDOT(r) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(r) : "v"(x), "v"(y))
#else
#define IDOT(r) __asm__ volatile("{vex} vpdpbusd %1, %2, %0" : "+x"(r) : "x"(x), "x"(y))
#endif
    IDOT(r0); IDOT(r1); IDOT(r2); IDOT(r3); IDOT(r4); IDOT(r5);
    IDOT(r6); IDOT(r7); IDOT(r8); IDOT(r9); IDOT(r10); IDOT(r11);
  }
  return (double)rounds * 12 * 2 * BYTES;
#else
  return 0;
#endif
}

double f32_fmas(size_t rounds) {
#ifdef __AVX512F__
#define V __m512
#define ZERO _mm512_setzero_ps()
#define LANES 16
#else
#define V __m256
#define ZERO _mm256_setzero_ps()
#define LANES 8
#endif
  register V r0 = ZERO, r1 = r0, r2 = r0, r3 = r0, r4 = r0, r5 = r0;
  register V r6 = r0, r7 = r0, r8 = r0, r9 = r0, r10 = r0, r11 = r0;
  V x = ZERO, y = x;
  for (size_t i = 0; i < rounds; i++) {
#define FMA(r) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(r) : "v"(x), "v"(y))
    FMA(r0); FMA(r1); FMA(r2); FMA(r3); FMA(r4); FMA(r5); FMA(r6); FMA(r7); FMA(r8); FMA(r9); FMA(r10); FMA(r11);
  }
  return (double)rounds * 12 * 2 * LANES;
}
"""


@dataclass(frozen=True)
class Limits:
    """Medians over the rounds: bytes a second and floating-point operations a second, all threads together."""

    threads: int
    read_bytes: float
    bf16_flops: float
    int8_ops: float
    f32_flops: float


class Probe:
    """Compiled once; `measure` may be called again and again, between the figures that it judges."""

    def __init__(self, threads: int, buffer_bytes: int = 1 << 30) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "limits.c"), Path(folder, "limits.so")
            source.write_text(SOURCE)
            subprocess.run(["cc", "-O2", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.read_stream.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.read_stream.restype = ctypes.c_uint64
        for name in ("bf16_dots", "int8_dots", "f32_fmas"):
            function = getattr(self._library, name)
            function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_double
        self.threads = threads
        self._bytes = buffer_bytes // threads // 256 * 256
        self._buffers = [ctypes.create_string_buffer(self._bytes + 64) for _ in range(threads)]
        for buffer in self._buffers:
            ctypes.memset(buffer, 1, len(buffer))

    def _parallel(self, call) -> float:
        """Seconds until every thread has returned from `call(index)`."""
        gate = threading.Barrier(self.threads + 1)

        def work(index: int) -> None:
            gate.wait()
            call(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.threads)]
        for thread in threads:
            thread.start()
        gate.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def read_bandwidth(self) -> float:
        """One reading of all buffers, in bytes a second."""

        def read(index: int) -> None:
            address = ctypes.addressof(self._buffers[index])
            self._library.read_stream((address + 63) & ~63, self._bytes)

        return self.threads * self._bytes / self._parallel(read)

    def arithmetic(self, name: str, rounds: int = 10_000_000) -> float:
        """Operations a second of `bf16_dots`, `int8_dots` or `f32_fmas` on all threads; 0 where there are none. Without
        a dot product bf16 is multiplied as f32."""
        done = [0.0] * self.threads

        def run(index: int) -> None:
            done[index] = getattr(self._library, name)(rounds)

        seconds = self._parallel(run)
        if name == "bf16_dots" and not any(done):
            return self.arithmetic("f32_fmas", rounds)
        return sum(done) / seconds

    def measure(self, rounds: int = 5) -> Limits:
        """Medians of `rounds` readings of each limit, one after the other."""
        seen: dict[str, list[float]] = {"read": [], "bf16_dots": [], "int8_dots": [], "f32_fmas": []}
        for _ in range(rounds):
            for name, values in seen.items():
                values.append(self.read_bandwidth() if name == "read" else self.arithmetic(name))
        return Limits(self.threads, *(statistics.median(values) for values in seen.values()))


if __name__ == "__main__":
    for count in (1, 2):
        limits = Probe(count).measure()
        print(
            f"{count} thread(s): read {limits.read_bytes / 1e9:.1f} GB/s, bf16 {limits.bf16_flops / 1e9:.0f} GFLOP/s, "
            f"int8 {limits.int8_ops / 1e9:.0f} GOP/s, f32 {limits.f32_flops / 1e9:.0f} GFLOP/s"
        )
