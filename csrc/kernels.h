// What the Python module can launch. Raw addresses and sizes only: nothing here knows torch.
#pragma once

#include <cstdint>

#include "short_attention/arguments.h"

namespace hlip {

enum class Type : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3, kInt16 = 4 };

// Where to run. A zero address in `stream` is the default stream of the current device.
struct Target {
  bool on_host;
  uintptr_t stream;
};

// An address that came from Python, as what it points to.
template <typename T>
T* as(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Mean over the patch rows of every segment.
//   x (R, C) -> out (S, C). chunks (num_chunks, 3) int32: segment, first row, one past the last; a segment's chunks follow
//   one another, chunk_offsets (S + 1) int32 says where. partial (num_chunks, C) float32 is scratch. Empty segments give 0.
void segment_mean(Target target, Type type, uintptr_t x, uintptr_t out, uintptr_t partial, uintptr_t offsets, uintptr_t chunks,
                  uintptr_t chunk_offsets, int64_t num_chunks, int64_t num_segments, int64_t channels);

// grad_out (S, C) -> grad_x (R, C), every row written; rows from num_tokens on are 0.
void segment_mean_backward(Target target, Type type, uintptr_t grad_out, uintptr_t grad_x, uintptr_t offsets, uintptr_t chunks,
                           int64_t num_chunks, int64_t num_tokens, int64_t num_rows, int64_t channels);

// Prefix rows of one level from those of another.
//   source (tail_rows, C), result (tail_rows, C), may not overlap. children (S_parent + 1) int32, parents (S_child) int32.
//   up:   segment s = sum over its children, divided by their number if `divide`.
//   down: segment s = its parent's row, divided by the parent's number of children if `divide`.
//   Rows beyond the segments of the level of the result become 0.
void switch_tail(Target target, Type type, uintptr_t source, uintptr_t result, uintptr_t children, uintptr_t parents,
                 int64_t num_parents, int64_t num_children, int64_t num_prefix, int64_t tail_rows, int64_t channels, bool up,
                 bool divide);

// Volumes -> normalised patch rows: out[t, :] = voxels of patch t * scale + shift.
//   scans (num_scans, 8) int64: first voxel, D, H, W, grid d, h, w, first patch. Voxels outside a volume read as 0.
//   keep (num_patches) int32: which patches to make, or 0 for all.
void patchify(Target target, Type voxel_type, Type type, uintptr_t voxels, uintptr_t out, uintptr_t scans, uintptr_t keep,
              int64_t num_scans, int64_t num_patches, int64_t pd, int64_t ph, int64_t pw, float scale, float shift);

// grad_out (num_patches, pd * ph * pw) -> grad_voxels, which the caller has zeroed; each voxel is written at most once.
void patchify_backward(Target target, Type voxel_type, Type type, uintptr_t grad_out, uintptr_t grad_voxels, uintptr_t scans,
                       uintptr_t keep, int64_t num_scans, int64_t num_patches, int64_t pd, int64_t ph, int64_t pw, float scale);

// Attention over short segments for one head dim of kShortHeadDims; each is compiled on its own (short_attention/launch.cu). Throws,
// naming kernel, configuration and layout, when there is no kernel or it cannot be launched.
template <int kHeadDim>
void short_forward(Target target, Type type, const ForwardArguments& arguments, const Extent& extent);
template <int kHeadDim>
void short_backward(Target target, Type type, const BackwardArguments& arguments, const Extent& extent);

}  // namespace hlip
