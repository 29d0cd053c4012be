// Segment means and prefix rows: reductions and broadcasts over ragged rows, one thread per (segment or chunk, vector).
//
// A long segment is cut into chunks so that a few large studies still fill the card; partial sums are added in a fixed
// order, so results are the same bits every run.
#include "dispatch.cuh"

namespace hlip {
namespace {

template <typename T, int N>
HLIP_BOTH void add_row(float (&sum)[N], const T* row) {
  const Vec<T, N> values = *reinterpret_cast<const Vec<T, N>*>(row);
#pragma unroll
  for (int e = 0; e < N; ++e) sum[e] += to_float(values.at[e]);
}

template <typename T, int N>
HLIP_BOTH void store_row(T* row, const float (&sum)[N], float factor) {
  Vec<T, N> values;
#pragma unroll
  for (int e = 0; e < N; ++e) values.at[e] = from_float<T>(sum[e] * factor);
  *reinterpret_cast<Vec<T, N>*>(row) = values;
}

// Thread (chunk, vector): float32 sum over the chunk's rows.
template <typename T, int N>
struct SumChunk {
  const T* x;
  float* partial;
  const int* chunks;
  int64_t channels;

  HLIP_BOTH void operator()(int64_t i) const {
    const int64_t vectors = channels / N, chunk = i / vectors, column = (i % vectors) * N;
    float sum[N] = {};
    for (int64_t row = chunks[3 * chunk + 1]; row < chunks[3 * chunk + 2]; ++row) add_row<T, N>(sum, x + row * channels + column);
    for (int e = 0; e < N; ++e) partial[chunk * channels + column + e] = sum[e];
  }
};

// Thread (segment, vector): sum of the segment's partial sums over its length.
template <typename T, int N>
struct FinishMean {
  const float* partial;
  T* out;
  const int* offsets;
  const int* chunk_offsets;
  int64_t channels;

  HLIP_BOTH void operator()(int64_t i) const {
    const int64_t vectors = channels / N, segment = i / vectors, column = (i % vectors) * N;
    float sum[N] = {};
    for (int64_t chunk = chunk_offsets[segment]; chunk < chunk_offsets[segment + 1]; ++chunk) {
      for (int e = 0; e < N; ++e) sum[e] += partial[chunk * channels + column + e];
    }
    const int length = offsets[segment + 1] - offsets[segment];
    store_row<T, N>(out + segment * channels + column, sum, length > 0 ? 1.0f / static_cast<float>(length) : 0.0f);
  }
};

// Thread (chunk, vector): the segment's gradient over its length, to every row of the chunk.
template <typename T, int N>
struct SpreadMean {
  const T* grad_out;
  T* grad_x;
  const int* offsets;
  const int* chunks;
  int64_t channels;

  HLIP_BOTH void operator()(int64_t i) const {
    const int64_t vectors = channels / N, chunk = i / vectors, column = (i % vectors) * N;
    const int64_t segment = chunks[3 * chunk];
    float grad[N] = {};
    add_row<T, N>(grad, grad_out + segment * channels + column);
    const float factor = 1.0f / static_cast<float>(offsets[segment + 1] - offsets[segment]);
    for (int64_t row = chunks[3 * chunk + 1]; row < chunks[3 * chunk + 2]; ++row) {
      store_row<T, N>(grad_x + row * channels + column, grad, factor);
    }
  }
};

template <typename T, int N>
struct Zero {
  T* x;

  HLIP_BOTH void operator()(int64_t i) const {
    const float zero[N] = {};
    store_row<T, N>(x + i * N, zero, 0.0f);
  }
};

// Thread (tail row, vector) of the result.
template <typename T, int N>
struct SwitchTail {
  const T* source;
  T* result;
  const int* children;
  const int* parents;
  int64_t num_targets, num_prefix, channels;
  bool up, divide;

  HLIP_BOTH void operator()(int64_t i) const {
    const int64_t vectors = channels / N, row = i / vectors, column = (i % vectors) * N;
    const int64_t segment = row / num_prefix, prefix = row % num_prefix;
    float sum[N] = {};
    float factor = 1.0f;
    if (segment < num_targets) {
      const int64_t parent = up ? segment : parents[segment];
      const int first = children[parent], last = children[parent + 1];
      const int64_t from = up ? first : parent, to = up ? last : parent + 1;
      for (int64_t s = from; s < to; ++s) add_row<T, N>(sum, source + (s * num_prefix + prefix) * channels + column);
      if (divide && last > first) factor = 1.0f / static_cast<float>(last - first);
    }
    store_row<T, N>(result + row * channels + column, sum, factor);
  }
};

}  // namespace

void segment_mean(Target target, Type type, uintptr_t x, uintptr_t out, uintptr_t partial, uintptr_t offsets, uintptr_t chunks,
                  uintptr_t chunk_offsets, int64_t num_chunks, int64_t num_segments, int64_t channels) {
  with_float_type(type, "segment_mean", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(channels, {x, out, partial}, [&](auto width) {
      constexpr int N = decltype(width)::value;
      for_each("segment_mean (sum of chunks)", target, num_chunks * (channels / N),
               SumChunk<T, N>{as<const T>(x), as<float>(partial), as<const int>(chunks), channels});
      for_each("segment_mean (mean of segments)", target, num_segments * (channels / N),
               FinishMean<T, N>{as<const float>(partial), as<T>(out), as<const int>(offsets), as<const int>(chunk_offsets), channels});
    });
  });
}

void segment_mean_backward(Target target, Type type, uintptr_t grad_out, uintptr_t grad_x, uintptr_t offsets, uintptr_t chunks,
                           int64_t num_chunks, int64_t num_tokens, int64_t num_rows, int64_t channels) {
  with_float_type(type, "segment_mean_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(channels, {grad_out, grad_x}, [&](auto width) {
      constexpr int N = decltype(width)::value;
      for_each("segment_mean_backward", target, num_chunks * (channels / N),
               SpreadMean<T, N>{as<const T>(grad_out), as<T>(grad_x), as<const int>(offsets), as<const int>(chunks), channels});
      for_each("segment_mean_backward (rows outside)", target, (num_rows - num_tokens) * (channels / N),
               Zero<T, N>{as<T>(grad_x) + num_tokens * channels});
    });
  });
}

void switch_tail(Target target, Type type, uintptr_t source, uintptr_t result, uintptr_t children, uintptr_t parents,
                 int64_t num_parents, int64_t num_children, int64_t num_prefix, int64_t tail_rows, int64_t channels, bool up,
                 bool divide) {
  with_float_type(type, "switch_tail", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(channels, {source, result}, [&](auto width) {
      constexpr int N = decltype(width)::value;
      for_each("switch_tail", target, tail_rows * (channels / N),
               SwitchTail<T, N>{as<const T>(source), as<T>(result), as<const int>(children), as<const int>(parents),
                                up ? num_parents : num_children, num_prefix, channels, up, divide});
    });
  });
}

}  // namespace hlip
