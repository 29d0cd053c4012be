// From a runtime type code to a template argument.
#pragma once

#include <stdexcept>
#include <string>

#include "element.cuh"
#include "for_each.cuh"
#include "kernels.h"

namespace hlip {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls run(TypeTag<T>{}) for the floating type named by `type`.
template <typename Run>
void with_float_type(Type type, const char* what, Run run) {
  switch (type) {
    case Type::kFloat32: return run(TypeTag<float>{});
    case Type::kFloat16: return run(TypeTag<__half>{});
    case Type::kBFloat16: return run(TypeTag<__nv_bfloat16>{});
    default: throw std::runtime_error(std::string("hlip: ") + what + " has no kernel for type code " + std::to_string(static_cast<int>(type)));
  }
}

// Calls run(TypeTag<T>{}) for the stored type of voxels.
template <typename Run>
void with_voxel_type(Type type, const char* what, Run run) {
  switch (type) {
    case Type::kUInt8: return run(TypeTag<uint8_t>{});
    case Type::kInt16: return run(TypeTag<int16_t>{});
    default: return with_float_type(type, what, run);
  }
}

// Calls run(std::integral_constant<int, N>) with the widest vector that rows of `channels` elements and the addresses allow.
template <typename T, typename Run>
void with_vector_width(int64_t channels, std::initializer_list<uintptr_t> addresses, Run run) {
  bool wide = channels % kWide<T> == 0;
  for (uintptr_t address : addresses) wide = wide && address % 16 == 0;
  if (wide) {
    run(std::integral_constant<int, kWide<T>>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

}  // namespace hlip
