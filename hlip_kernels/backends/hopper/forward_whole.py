"""Forward attention of short segments for Hopper in Gluon: a program takes whole ones, of up to 256 rows, one after the other.

As :mod:`.forward`, with four consumers of 64 rows, and with the queries too brought by the producer while the segment before
is worked on: segments have few tiles of keys, and no time to wait for them. Everything is read once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .forward import attend, write_output
from .own import hand_over_own, load_own, make_own, make_own_bars
from .ring import ROWS, await_round_before, await_use, complete_use, item_of, make_rings, produce_record


@gluon.jit
def _pass_by(rings, used, k_total, STAGES: gl.constexpr):
    """Keys and values of an item of which this consumer has no rows: given back as they come. Returns the use after them."""
    k_smem, _, full_k, full_v, empty_k, empty_v = rings
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    for _ in range(0, k_total, BLOCK_N):
        await_use(full_k, used, STAGES)
        complete_use(empty_k, used, STAGES)
        await_use(full_v, used, STAGES)
        complete_use(empty_v, used, STAGES)
        used += 1
    return used


@gluon.jit
def _consume(tensors, numbers, owned, rings, INDEX: gl.constexpr, STAGES: gl.constexpr, OWN_STAGES: gl.constexpr):
    """Query rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    out, lse, tiles, records = tensors
    out_row, out_head, num_rows, heads, num_items, scale_log2 = numbers
    own_q, full_own, empty_own = owned
    dtype: gl.constexpr = rings[0].dtype
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        k_total = met[3]
        at = start + INDEX * ROWS
        await_use(full_own, done, OWN_STAGES)
        if at < own[3]:
            # In shared memory: 64 queries in registers do not fit beside what 64 keys ask for.
            q = own_q.index(done % OWN_STAGES).slice(INDEX * ROWS, ROWS)
            acc_MD, max_M, sum_M, used = attend(q, rings, used, k_total, scale_log2, STAGES)
            complete_use(empty_own, done, OWN_STAGES)
            write_output(
                acc_MD, max_M, sum_M, out + head * out_head, out_row, lse + head * num_rows, at, own, scale_log2, dtype
            )
        else:
            complete_use(empty_own, done, OWN_STAGES)
            used = _pass_by(rings, used, k_total, STAGES)
        done += 1


@gluon.jit
def _produce(
    q_source, sources, q_numbers, numbers, owned, rings, STAGES: gl.constexpr, PART: gl.constexpr, OWN_STAGES: gl.constexpr
):
    """The queries of every item, zeros past its end, then its keys and values."""
    q_desc, q = q_source
    q_row, q_head = q_numbers
    tiles, records = sources[4], sources[5]
    heads, num_items = numbers[4], numbers[5]
    own_q, full_own, empty_own = owned
    made, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        number = item % heads
        await_round_before(empty_own, done, OWN_STAGES)
        bar, place = full_own.index(done % OWN_STAGES), own_q.index(done % OWN_STAGES)
        copied = load_own(q_desc, q + head * q_head, q_row, number * q_head, start, own, place, bar, PART)
        hand_over_own(full_own, done, copied, OWN_STAGES)
        done += 1
        made = produce_record(sources, rings, numbers, (), number, met, made, STAGES, PART)


@gluon.jit(do_not_specialize=["num_rows", "heads", "num_items"])  # they change with every batch
def attention_forward_whole(
    q_desc, k_desc, v_desc, q, k, v, out, lse, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, num_rows, heads, num_items, scale_log2,
    OWN_STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``out = softmax(scale q k^T) v`` and ``lse`` of segments of at most 256 rows. An item is one segment of one head."""
    own_q = make_own(q_desc.dtype, BLOCK_D, CONSUMERS, OWN_STAGES)
    full_own, empty_own = make_own_bars(own_q, BLOCK_N, 1, CONSUMERS, OWN_STAGES)
    owned = (own_q, full_own, empty_own)
    rings = make_rings(k_desc, v_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, False)
    sources = (k_desc, v_desc, k, v, tiles, records)
    strides = (k_row, k_head, v_row, v_head, heads, num_items)
    tensors = (out, lse, tiles, records)
    numbers = (out_row, out_head, num_rows, heads, num_items, scale_log2)
    gl.static_assert(CONSUMERS == 4)
    gl.warp_specialize(
        [
            (_consume, (tensors, numbers, owned, rings, 0, STAGES, OWN_STAGES)),
            (_consume, (tensors, numbers, owned, rings, 1, STAGES, OWN_STAGES)),
            (_consume, (tensors, numbers, owned, rings, 2, STAGES, OWN_STAGES)),
            (_consume, (tensors, numbers, owned, rings, 3, STAGES, OWN_STAGES)),
            (_produce, ((q_desc, q), sources, (q_row, q_head), strides, owned, rings, STAGES, PART, OWN_STAGES)),
        ],
        [4, 4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
