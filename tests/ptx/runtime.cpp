// A stand-in for the CUDA runtime: what nvcc's host code and the extension's own call of it, and no more. Linked into the extension
// in place of libcudart, it hands each launch to a function that Python sets, and knows of one card what a launch depends on.
//
// It is as strict as the real one: shared memory beyond 48 KB must be asked for, the card has an end, and an error stays until
// cudaGetLastError() has told it.
#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#define HLIP_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kUnasked = 48 << 10;  // bytes of dynamic shared memory that a launch may have without asking
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostBlocks[] = {0x7fffffff, 0xffff, 0xffff};

struct Image {
  const void* code;  // a fat binary, as fatbinary(1) makes it
};

struct Kernel {
  std::string name;
  size_t dynamic_shared = kUnasked;  // the most a launch may have
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// Runs a kernel: its name, grid, block, bytes of dynamic shared memory, stream, and the address of each argument. Returns a
// cudaError_t.
using Launch = int (*)(const char* name, const unsigned* grid, const unsigned* block, size_t shared, void* stream,
                       void** arguments);

// Made when first asked for: code registers itself before main() runs, in any order.
struct State {
  std::vector<std::unique_ptr<Image>> images;
  std::map<const void*, std::unique_ptr<Kernel>> kernels;  // by the address of the host's function
  Launch launch = nullptr;
  int multiprocessors = 0;
  size_t shared = 0;  // bytes that a block may have
  int lowered = 0;    // how often a kernel was allowed less dynamic shared memory than before
};

State& state() {
  static State* made = new State;
  return *made;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::vector<Configuration> configurations;

cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

Kernel* find(const void* function) {
  const auto found = state().kernels.find(function);
  return found == state().kernels.end() ? nullptr : found->second.get();
}

cudaError_t run(const Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  for (int i = 0; i < 3; ++i) {
    if (blocks[i] == 0 || blocks[i] > kMostBlocks[i] || threads[i] == 0) return cudaErrorInvalidConfiguration;
  }
  if (static_cast<uint64_t>(block.x) * block.y * block.z > kMostThreads) return cudaErrorInvalidConfiguration;
  if (shared > kernel->dynamic_shared) return cudaErrorInvalidValue;
  if (state().launch == nullptr) return cudaErrorNoDevice;
  return static_cast<cudaError_t>(state().launch(kernel->name.c_str(), blocks, threads, shared, stream, arguments));
}

}  // namespace

// ---------------------------------------------------------------- for Python

// Sets what runs kernels, and the card: its multiprocessors, and the bytes of shared memory a block may have. What kernels asked
// for before is forgotten.
HLIP_EXPORT void hlip_runtime_start(Launch launch, int multiprocessors, size_t shared) {
  state().launch = launch;
  state().multiprocessors = multiprocessors;
  state().shared = shared;
  state().lowered = 0;
  for (auto& kernel : state().kernels) kernel.second->dynamic_shared = kUnasked;
}

// How often since then a kernel was allowed less than before, where another thread may be about to launch it with more.
HLIP_EXPORT int hlip_runtime_lowered() { return state().lowered; }

// Forgets the last error.
HLIP_EXPORT void hlip_runtime_forget() { last_error = cudaSuccess; }

// The code the library brought, a fat binary after the other; null after the last.
HLIP_EXPORT const void* hlip_runtime_image(size_t index) {
  return index < state().images.size() ? state().images[index]->code : nullptr;
}

// ---------------------------------------------------------------- what nvcc's host code calls

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* code;
  };
  state().images.push_back(std::make_unique<Image>(Image{static_cast<const Wrapper*>(wrapper)->code}));
  return reinterpret_cast<void**>(state().images.back().get());
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name;
  state().kernels[function] = std::move(kernel);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return told(cudaErrorMissingConfiguration);
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(find(function));
  return told(*kernel == nullptr ? cudaErrorInvalidDeviceFunction : cudaSuccess);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return told(run(reinterpret_cast<const Kernel*>(kernel), grid, block, arguments, shared, stream));
}

// ---------------------------------------------------------------- what anybody calls

// Host code of nvcc 12 launches with this one.
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return told(run(find(function), grid, block, arguments, shared, stream));
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = find(function);
  if (kernel == nullptr) return told(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return told(cudaErrorNotSupported);
  if (value < 0 || static_cast<size_t>(value) > state().shared) return told(cudaErrorInvalidValue);
  state().lowered += static_cast<size_t>(value) < kernel->dynamic_shared;
  kernel->dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorMissingConfiguration: return "__global__ function call is not configured";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "unrecognized error code";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return told(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = state().multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(state().shared); return cudaSuccess;
    default: return told(cudaErrorInvalidValue);
  }
}

}  // extern "C"
