"""Every shipped Hopper kernel compiled for sm_90a: its machine code held to limits, looked through for the overlap that the
source asks for, and compared with what it was when last looked at (``tests/codegen``, one file for each version of triton).

Runs without a GPU, in processes of its own: the interpreter that other tests use must be off.
"""

import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hlip_kernels.backends.hopper import _why_no_gluon
from hlip_kernels.backends.hopper.config import FUSED, KERNELS, WHOLE
from hlip_kernels.machine_code import Instruction
from hlip_kernels.resources import read_rows
from hlip_kernels.resources_hopper import SHARED_MEMORY, HopperResources, in_flight, order_of, shipped, unsynchronised

RECORD = Path(__file__).parent / "codegen" / f"hopper-{'.'.join(version('triton').split('.')[:2])}.csv"
needs_gluon = pytest.mark.skipif(bool(_why_no_gluon()), reason=_why_no_gluon())


def check(row):
    # Rows that a program owns are loaded by unrolled code: of one to three tensors a tile for each consumer; of whole segments
    # backward, eight tiles of keys and of values.
    config = KERNELS[row.kernel][row.head_dim]
    own = {"attention_forward": 1, "attention_forward_whole": 1, "attention_backward_dq": 3, "attention_backward_whole": 8}
    boxes = config.block // config.box  # of a tile of the ring; all but the last of one that is not full may come by TMA too
    loads = config.consumers * own.get(row.kernel, 2) + 2 * boxes + 2 * (boxes - 1)
    assert row.products > 0 and row.tma_loads == loads, row
    assert 0 < row.shared_memory <= SHARED_MEMORY, row
    # Of whole segments, one access a step in each consumer, and up to eight in the loop of the group that makes dQ, which has
    # time; one in the reducer's. The rest of those 160 bytes is moved once an item.
    spills = 2 if row.kernel in WHOLE else 0
    reducer = 8 if row.kernel in WHOLE else 1 if row.kernel in FUSED else 0
    assert row.loop_spills <= spills and row.reducer_spills <= reducer and row.spill_bytes <= 160, row
    assert not row.serialized and not row.unsynchronised, row
    # In the loop of every consumer all exponentials of a tile: a thread has 32 of each 64 x 64.
    assert row.exponentials >= config.rows // 64 * config.block // 2 and row.overlapped == row.exponentials, row
    parts = [part for part in row.order.split(", ") if not part.endswith("spill")]
    assert parts[0].endswith("product") and parts[-1] == "wait 0", row
    # Forward: the next logits and these values begin, and exponentials of the one do not wait for the other.
    if row.kernel.startswith("attention_forward"):
        assert [parts[1], parts[3]] == ["wait 1", "wait 0"] and parts[2].endswith("exp2") and len(parts) == 4, row


@needs_gluon
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_loads_spills_and_overlap(dtype, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hlip_kernels.resources_hopper", "--dtype", dtype, "--csv", str(tmp_path / "rows.csv")]
    if RECORD.exists():  # compiled again where it has changed, and always in bfloat16 at head dim 64
        command += ["--known", str(RECORD), *(["--anew", "64"] if dtype == "bfloat16" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "rows.csv", HopperResources)
    assert len(rows) == len(list(shipped([dtype])))
    for row in rows:
        check(row)
    if not RECORD.exists():
        pytest.skip(
            f"within limits, but there is no {RECORD.name} to compare with: make one (see hlip_kernels.resources_hopper)"
        )
    known = {row: row.source for row in read_rows(RECORD, HopperResources)}
    changed = [row for row in rows if row not in known]
    assert not changed, (
        f"the machine code is not what {RECORD.name} says it was: {changed}. If that is an improvement or was meant: "
        f"python -m hlip_kernels.resources_hopper --csv tests/codegen/{RECORD.name}, and say why in the commit"
    )
    if any(row.source != known[row] for row in rows):
        warnings.warn(
            f"{RECORD.name} was made of another source or with another compiler: the same figures, but all is compiled",
            stacklevel=1,
        )


def test_every_shipped_configuration_is_on_record():
    records = sorted(RECORD.parent.glob("hopper-*.csv"))
    assert len(records) >= 3
    for record in records:
        rows = read_rows(record, HopperResources)
        named = {(r.kernel, r.dtype, r.head_dim, r.variant) for r in rows}
        expected = {(k, t, d, " ".join(f"{n}={v}" for n, v in variant.items())) for k, t, d, variant in shipped()}
        assert named == expected, record
        for row in rows:
            config = KERNELS[row.kernel][row.head_dim]
            sizes = (config.consumers, config.block, config.stages)
            assert (row.consumers, row.block, row.stages) == sizes, f"{record.name} is out of date: {row}"
            check(row)


PRODUCT = Instruction("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], R24, gsb0 ;", False)
EXP2 = Instruction("MUFU.EX2", "R1, R2 ;", False)
BARRIER = Instruction("BAR.SYNC.DEFER_BLOCKING", "0x1, 0x80 ;", False)
LOAD = Instruction("LDS.128", "R4, [R1] ;", False)
STORE, ARRIVE = Instruction("STS.128", "[R1], R4 ;", False), Instruction("SYNCS.ARRIVE.TRANS64.A1T0", "RZ, [UR4], RZ ;", True)


def wait(n):
    return Instruction("WARPGROUP.DEPBAR.LE", f"gsb0, {n:#x} ;", False)


@pytest.mark.parametrize(
    "loop, exponentials, overlapped",
    [
        ([PRODUCT, EXP2, EXP2, PRODUCT, wait(0)], 2, 2),
        ([PRODUCT, wait(0), EXP2, EXP2, PRODUCT, wait(0)], 2, 0),
        ([EXP2, PRODUCT, EXP2, wait(0)], 2, 1),
        ([EXP2, wait(0), EXP2, PRODUCT], 2, 1),  # what the turn before has left in flight
        ([PRODUCT, PRODUCT, wait(1), EXP2, wait(0), EXP2], 2, 1),
    ],
)
def test_products_in_flight(loop, exponentials, overlapped):
    assert in_flight(loop) == (exponentials, overlapped)


def test_the_order_of_a_loop():
    assert order_of([PRODUCT, PRODUCT, BARRIER, EXP2, STORE, EXP2, wait(1)]) == "2 product, 2 exp2, wait 1"


@pytest.mark.parametrize(
    "code, count",
    [
        ([PRODUCT, wait(0), BARRIER, ARRIVE, ARRIVE], 0),
        ([PRODUCT, wait(0), ARRIVE], 1),
        ([BARRIER, wait(0), EXP2, ARRIVE], 1),
        ([STORE, ARRIVE, BARRIER], 1),
        ([BARRIER, LOAD, ARRIVE], 1),
        ([LOAD, BARRIER, ARRIVE, PRODUCT], 0),
        ([STORE, PRODUCT], 1),
        ([STORE, BARRIER, PRODUCT, wait(0), BARRIER, ARRIVE], 0),
    ],
)
def test_what_no_barrier_orders(code, count):
    assert unsynchronised(code) == count
