// Volumes of any stored type to normalised patch rows, ragged scans in one launch, and its gradient.
#include "dispatch.cuh"

namespace hlip {
namespace {

struct Scan {
  int64_t first_voxel, depth, height, width, grid_d, grid_h, grid_w, first_patch;
};

struct Patches {
  const Scan* scans;
  const int* keep;  // may be null: all patches
  int64_t num_scans, pd, ph, pw;

  // The scan that holds a patch: the last one whose first patch is not after it.
  HLIP_BOTH const Scan& scan_of(int64_t patch) const {
    int64_t low = 0, high = num_scans - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (scans[middle].first_patch <= patch) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return scans[low];
  }

  // Address (in elements) of N neighbouring voxels of output row `row` starting at element `element`, and how many of
  // them lie inside the volume.
  template <int N>
  HLIP_BOTH int64_t voxel(int64_t row, int64_t element, int& inside) const {
    const int64_t patch = keep ? keep[row] : row;
    const Scan& scan = scan_of(patch);
    int64_t in_scan = patch - scan.first_patch;
    const int64_t gx = in_scan % scan.grid_w;
    in_scan /= scan.grid_w;
    const int64_t gy = in_scan % scan.grid_h, gz = in_scan / scan.grid_h;
    const int64_t x = gx * pw + element % pw, y = gy * ph + (element / pw) % ph, z = gz * pd + element / (pw * ph);
    const int64_t left = scan.width - x;
    // A patch number out of range (a broken `keep`) lands below or beyond the volume and reads nothing.
    const bool some = patch >= 0 && z < scan.depth && y < scan.height && left > 0;
    inside = some ? static_cast<int>(left < N ? left : N) : 0;
    return scan.first_voxel + (z * scan.height + y) * scan.width + x;
  }
};

// Thread (patch, N neighbouring elements of one patch line).
template <typename V, typename T, int N>
struct Patchify {
  const V* voxels;
  T* out;
  Patches patches;
  float scale, shift;

  HLIP_BOTH void operator()(int64_t i) const {
    const int64_t size = patches.pd * patches.ph * patches.pw, vectors = size / N;
    const int64_t row = i / vectors, element = (i % vectors) * N;
    int inside;
    const int64_t at = patches.voxel<N>(row, element, inside);
    Vec<T, N> values;
#pragma unroll
    for (int e = 0; e < N; ++e) values.at[e] = from_float<T>((e < inside ? to_float(voxels[at + e]) : 0.0f) * scale + shift);
    *reinterpret_cast<Vec<T, N>*>(out + row * size + element) = values;
  }
};

template <typename V, typename T, int N>
struct Unpatchify {
  const T* grad_out;
  V* grad_voxels;
  Patches patches;
  float scale;

  HLIP_BOTH void operator()(int64_t i) const {
    const int64_t size = patches.pd * patches.ph * patches.pw, vectors = size / N;
    const int64_t row = i / vectors, element = (i % vectors) * N;
    int inside;
    const int64_t at = patches.voxel<N>(row, element, inside);
    const Vec<T, N> values = *reinterpret_cast<const Vec<T, N>*>(grad_out + row * size + element);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (e < inside) grad_voxels[at + e] = from_float<V>(to_float(values.at[e]) * scale);
    }
  }
};

}  // namespace

void patchify(Target target, Type voxel_type, Type type, uintptr_t voxels, uintptr_t out, uintptr_t scans, uintptr_t keep,
              int64_t num_scans, int64_t num_patches, int64_t pd, int64_t ph, int64_t pw, float scale, float shift) {
  const Patches patches{as<const Scan>(scans), as<const int>(keep), num_scans, pd, ph, pw};
  with_voxel_type(voxel_type, "patchify", [&](auto voxel_tag) {
    using V = typename decltype(voxel_tag)::type;
    with_float_type(type, "patchify", [&](auto tag) {
      using T = typename decltype(tag)::type;
      with_vector_width<T>(pw, {out}, [&](auto width) {
        constexpr int N = decltype(width)::value;
        for_each("patchify", where_of(target), num_patches * (pd * ph * pw / N),
                 Patchify<V, T, N>{as<const V>(voxels), as<T>(out), patches, scale, shift});
      });
    });
  });
}

void patchify_backward(Target target, Type voxel_type, Type type, uintptr_t grad_out, uintptr_t grad_voxels, uintptr_t scans,
                       uintptr_t keep, int64_t num_scans, int64_t num_patches, int64_t pd, int64_t ph, int64_t pw, float scale) {
  const Patches patches{as<const Scan>(scans), as<const int>(keep), num_scans, pd, ph, pw};
  with_float_type(voxel_type, "patchify_backward", [&](auto voxel_tag) {
    using V = typename decltype(voxel_tag)::type;
    with_float_type(type, "patchify_backward", [&](auto tag) {
      using T = typename decltype(tag)::type;
      with_vector_width<T>(pw, {grad_out}, [&](auto width) {
        constexpr int N = decltype(width)::value;
        for_each("patchify_backward", where_of(target), num_patches * (pd * ph * pw / N),
                 Unpatchify<V, T, N>{as<const T>(grad_out), as<V>(grad_voxels), patches, scale});
      });
    });
  });
}

}  // namespace hlip
