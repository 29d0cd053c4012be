// Element types and 16-byte vectors, usable on the device and on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define HLIP_BOTH __host__ __device__ __forceinline__

namespace hlip {

HLIP_BOTH float to_float(float v) { return v; }
HLIP_BOTH float to_float(__half v) { return __half2float(v); }
HLIP_BOTH float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
HLIP_BOTH float to_float(uint8_t v) { return static_cast<float>(v); }
HLIP_BOTH float to_float(int16_t v) { return static_cast<float>(v); }

template <typename T>
HLIP_BOTH T from_float(float v);
template <>
HLIP_BOTH float from_float<float>(float v) { return v; }
template <>
HLIP_BOTH __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
HLIP_BOTH __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T>
constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<__half> = true;

// N elements moved by one load or store when N * sizeof(T) is 2, 4, 8 or 16 and the address is a multiple of that.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

// Elements of T in 16 bytes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

}  // namespace hlip
