// Volumes of any stored type to normalised patch rows, ragged scans in one launch, and its gradient.
#include "dispatch.cuh"

namespace hlip {
namespace {

struct Scan {
  int64_t first_voxel, depth, height, width, grid_d, grid_h, grid_w, first_patch;
};

// Division by a number known on the host, as a multiplication: exact for numbers below 2^31. (Granlund and Montgomery, 1994.)
struct Divisor {
  uint32_t by, multiplier;
  int shift;

  explicit Divisor(int64_t n) : by(static_cast<uint32_t>(n)) {
    int bits = 0;
    while ((int64_t{1} << bits) < n) ++bits;
    shift = 31 + bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by);
  }
  HLIP_BOTH uint32_t of(uint32_t x) const { return static_cast<uint32_t>((static_cast<uint64_t>(x) * multiplier) >> shift); }
};

// Where a patch lies: its volume and the voxel of its first corner. Copied, so that it stays in registers while rows are
// written, which might for all the compiler knows change the table.
struct Corner {
  int64_t first_voxel, depth, height, width;
  int64_t x, y, z;
  bool there;
};

struct Patches {
  const Scan* scans;
  const int* keep;  // may be null: all patches
  int64_t num_scans, pd, ph, pw;
  Divisor width, height;  // by pw and ph

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

  HLIP_BOTH Corner corner(int64_t row) const {
    const int64_t patch = keep ? keep[row] : row;
    const Scan& scan = scan_of(patch);
    // A patch number out of range (a broken `keep`) is none; a scan has fewer than 2^31 patches.
    const int64_t in_scan = patch - scan.first_patch;
    const bool there = in_scan >= 0 && in_scan < scan.grid_d * scan.grid_h * scan.grid_w;
    const uint32_t at = there ? static_cast<uint32_t>(in_scan) : 0;
    const uint32_t grid_w = static_cast<uint32_t>(scan.grid_w), grid_h = static_cast<uint32_t>(scan.grid_h);
    const uint32_t line = at / grid_w, slice = line / grid_h;
    return {scan.first_voxel, scan.depth, scan.height, scan.width,
            (at - line * grid_w) * pw, (line - slice * grid_h) * ph, slice * pd, there};
  }

  // Address (in elements) of N neighbouring voxels of a patch starting at element `element`, and how many of them lie inside
  // the volume.
  template <int N>
  HLIP_BOTH int64_t voxel(const Corner& corner, uint32_t element, int& inside) const {
    const uint32_t line = width.of(element), plane = height.of(line);
    const int64_t x = corner.x + (element - line * width.by), y = corner.y + (line - plane * height.by), z = corner.z + plane;
    const int64_t left = corner.width - x;
    const bool some = corner.there && z < corner.depth && y < corner.height && left > 0;
    inside = some ? static_cast<int>(left < N ? left : N) : 0;
    return corner.first_voxel + (z * corner.height + y) * corner.width + x;
  }
};

template <typename V, int N>
HLIP_BOTH bool whole(const V* at, int inside) {
  return inside == N && reinterpret_cast<uintptr_t>(at) % sizeof(Vec<V, N>) == 0;
}

// A warp a patch; each lane takes N neighbouring elements of a patch line at a time.
template <typename V, typename T, int N>
struct Patchify {
  const V* voxels;
  T* out;
  Patches patches;
  float scale, shift;

  HLIP_BOTH void operator()(int64_t row, int lane, int lanes) const {
    const uint32_t size = static_cast<uint32_t>(patches.pd * patches.ph * patches.pw);
    const Corner corner = patches.corner(row);
    for (uint32_t element = lane * N; element < size; element += lanes * N) {
      int inside;
      const V* from = voxels + patches.voxel<N>(corner, element, inside);
      Vec<V, N> read = {};
      if (whole<V, N>(from, inside)) {
        read = *reinterpret_cast<const Vec<V, N>*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (e < inside) read.at[e] = from[e];
        }
      }
      Vec<T, N> values;
#pragma unroll
      for (int e = 0; e < N; ++e) values.at[e] = from_float<T>((e < inside ? to_float(read.at[e]) : 0.0f) * scale + shift);
      *reinterpret_cast<Vec<T, N>*>(out + row * size + element) = values;
    }
  }
};

template <typename V, typename T, int N>
struct Unpatchify {
  const T* grad_out;
  V* grad_voxels;
  Patches patches;
  float scale;

  HLIP_BOTH void operator()(int64_t row, int lane, int lanes) const {
    const uint32_t size = static_cast<uint32_t>(patches.pd * patches.ph * patches.pw);
    const Corner corner = patches.corner(row);
    for (uint32_t element = lane * N; element < size; element += lanes * N) {
      int inside;
      V* to = grad_voxels + patches.voxel<N>(corner, element, inside);
      const Vec<T, N> values = *reinterpret_cast<const Vec<T, N>*>(grad_out + row * size + element);
      Vec<V, N> written;
#pragma unroll
      for (int e = 0; e < N; ++e) written.at[e] = from_float<V>(to_float(values.at[e]) * scale);
      if (whole<V, N>(to, inside)) {
        *reinterpret_cast<Vec<V, N>*>(to) = written;
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (e < inside) to[e] = written.at[e];
        }
      }
    }
  }
};

Patches patches_of(uintptr_t scans, uintptr_t keep, int64_t num_scans, int64_t pd, int64_t ph, int64_t pw) {
  if (pd * ph * pw >= 0x7fffffff) throw std::runtime_error("hlip: a patch of " + std::to_string(pd * ph * pw) + " voxels is too large");
  return {as<const Scan>(scans), as<const int>(keep), num_scans, pd, ph, pw, Divisor(pw), Divisor(ph)};
}

}  // namespace

void patchify(Target target, Type voxel_type, Type type, uintptr_t voxels, uintptr_t out, uintptr_t scans, uintptr_t keep,
              int64_t num_scans, int64_t num_patches, int64_t pd, int64_t ph, int64_t pw, float scale, float shift) {
  const Patches patches = patches_of(scans, keep, num_scans, pd, ph, pw);
  with_voxel_type(voxel_type, "patchify", [&](auto voxel_tag) {
    using V = typename decltype(voxel_tag)::type;
    with_float_type(type, "patchify", [&](auto tag) {
      using T = typename decltype(tag)::type;
      with_vector_width<T>(pw, {out}, [&](auto width) {
        constexpr int N = decltype(width)::value;
        for_each_row("patchify", target, num_patches,
                     Patchify<V, T, N>{as<const V>(voxels), as<T>(out), patches, scale, shift});
      });
    });
  });
}

void patchify_backward(Target target, Type voxel_type, Type type, uintptr_t grad_out, uintptr_t grad_voxels, uintptr_t scans,
                       uintptr_t keep, int64_t num_scans, int64_t num_patches, int64_t pd, int64_t ph, int64_t pw, float scale) {
  const Patches patches = patches_of(scans, keep, num_scans, pd, ph, pw);
  with_float_type(voxel_type, "patchify_backward", [&](auto voxel_tag) {
    using V = typename decltype(voxel_tag)::type;
    with_float_type(type, "patchify_backward", [&](auto tag) {
      using T = typename decltype(tag)::type;
      with_vector_width<T>(pw, {grad_out}, [&](auto width) {
        constexpr int N = decltype(width)::value;
        for_each_row("patchify_backward", target, num_patches,
                     Unpatchify<V, T, N>{as<const T>(grad_out), as<V>(grad_voxels), patches, scale});
      });
    });
  });
}

}  // namespace hlip
