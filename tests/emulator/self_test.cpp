// What the emulator of csrc/device/emulated.h must compute, and what it must complain about. Takes the name of one case.
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "bad_kernels.h"
#include "good_kernels.h"

namespace hlip {
namespace {

#define CASE(name) {#name, name}
const std::map<std::string, std::function<void()>> kCases = {
    CASE(transposition),
    {"product_half", product<__half>},
    {"product_bfloat16", product<__nv_bfloat16>},
    {"matrices", [] { load(false); }},
    {"matrices_transposed", [] { load(true); }},
    CASE(shuffle),
    CASE(uniform_values),
    CASE(copies),
    CASE(copies_of_words),
    CASE(copies_again),
    CASE(grid),
    CASE(any),
    CASE(ordered),
    {"elements_half", elements<__half>},
    {"elements_bfloat16", elements<__nv_bfloat16>},
    CASE(functions),
    CASE(big_frames),
    CASE(order),
    CASE(race_between_warps),
    CASE(race_of_write_after_read),
    CASE(race_of_writes),
    CASE(race_within_a_warp),
    CASE(race_within_a_warp_of_write_after_read),
    CASE(race_of_matrix_load),
    CASE(race_with_copy),
    CASE(race_of_copy_after_read),
    CASE(read_before_copy_wait),
    CASE(read_before_copy_of_a_word_wait),
    CASE(races_with_copy_of_a_word),
    CASE(write_before_copy_wait),
    CASE(copy_never_waited_for),
    CASE(unwritten),
    CASE(unwritten_since_the_block_started),
    CASE(out_of_range),
    CASE(misaligned),
    CASE(written_twice),
    CASE(not_written),
    CASE(written_outside),
    CASE(different_collectives),
    CASE(different_places_of_one_collective),
    CASE(value_that_is_not_uniform),
    CASE(lane_exits_before_collective),
    CASE(barrier_not_reached_by_all),
    CASE(different_barriers),
    CASE(wrong_number_of_threads),
    CASE(exception_of_a_kernel),
};

}  // namespace
}  // namespace hlip

int main(int count, char** arguments) {
  const auto found = hlip::kCases.find(count == 2 ? arguments[1] : "");
  if (found == hlip::kCases.end()) {
    for (const auto& [name, run] : hlip::kCases) std::puts(name.c_str());
    return 2;
  }
  try {
    found->second();
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  return 0;
}
