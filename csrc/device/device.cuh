// The few things a kernel asks of a GPU: where it is, shared and global memory, warp collectives, matrix products.
//
// Kernels are written against these names alone, so that one source serves two machines: a GPU (cuda.cuh, thin wrappers over
// PTX that sm_80 and newer have), and a host that emulates a thread block under sanitizers (emulated.h), which is how they are
// tested where there is no GPU.
#pragma once

#ifdef HLIP_EMULATED
#include "emulated.h"
#else
#include "cuda.cuh"
#endif
