"""A kernel of each kind compiled for newer architectures, and with mistakes in csrc/device/cuda.cuh, the side that no emulator
sees."""

import shutil

import pytest
import test_short_attention as short
import torch
from ptx.extension import CompiledCudaBackend, extension
from ptx.extension_build import CSRC, ptx, readable
from ptx.program import PtxError, parse
from settled import CUDA_KERNELS

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def compiled():
    """The extension, with no launches and no errors yet."""
    made = extension()
    made.start_anew()
    return made


# One kernel of each kind, with the numbers that launches ask for, of each copy of csrc.
ONE_OF_EACH = """
template __global__ void hlip::short_attention_forward<T, 32, hlip::kForwardWarps, hlip::kForwardBlocks<32>>(
    hlip::ForwardArguments);
template __global__ void hlip::short_attention_whole_forward<T, 32, hlip::kForwardWarps, hlip::kWholeForwardBlocks<32>>(
    hlip::ForwardArguments);
template __global__ void hlip::short_attention_backward<T, 32, hlip::kBackwardWarps<32>, hlip::kBackwardBlocks<32>>(
    hlip::BackwardArguments);
template __global__ void hlip::short_attention_whole_backward<T, 32, 4, 32, 3>(hlip::WholeArguments);
"""


def one_of_each(compiled, code, dtype, namespace="hlip"):
    """Runs the kernels of :data:`ONE_OF_EACH` that nvcc made code of, in place of the library's, on packs of all kinds."""
    by_name = {readable(name): name for name in compiled.texts}
    code = {name: text for name, text in code.items() if f"{len(namespace)}{namespace}" in name}
    compiled.replaced = kernels = {by_name[readable(name)]: parse(text)[name] for name, text in code.items()}
    assert len(kernels) == 4
    backend = CompiledCudaBackend(multiprocessors=1)
    try:
        # The last row of the longer segment at the end is the tensors' last: nothing may be read beyond.
        short.check(backend, [3, 1, 0, 8, 20, 88, 2, 66], 1, dtype, 32)
        short.leaves_its_pack_alone(backend, dtype, 32, "v", float("nan"), (6,))
        short.reads_no_first_row_but_its_own(backend, [3, 88, 2, 66], dtype, 32)
    finally:
        compiled.replaced = {}
    assert {launch.kernel for launch in compiled.launches} == set(kernels)


@pytest.mark.parametrize("arch", ["90", "100"])
def test_newer_architectures(compiled, tmp_path, arch):
    """For which nvcc makes other PTX; from sm_100 on with another compiler."""
    source = tmp_path / "kernels.cu"
    source.write_text(f'#include "short_attention/choice.cuh"\nusing T = __nv_bfloat16;\n{ONE_OF_EACH}')
    one_of_each(compiled, ptx(source, arch, f"-I{CSRC}"), torch.bfloat16)


# Names, and what is replaced by what in csrc/device/cuda.cuh. Each is wrong in a way that only the device's side can be.
MUTANTS = {
    "as it is": ("", ""),
    "matrices transposed that should not be": ("m8n8.x4.shared", "m8n8.x4.trans.shared"),
    "matrices not transposed that should be": ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "quarters of a left operand exchanged": ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    "halves of a right operand exchanged": ('"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
    "pairs packed the other way round": ('"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    "copies of half as many bytes": ("cg.shared.global [%0], [%1], 16, %2", "ca.shared.global [%0], [%1], 8, %2"),
    "copies that nobody waits for": ('"cp.async.wait_all;"', '""'),
    "copies of rows that are not there": ("really ? 16 : 0", "16"),
    "a vote of all threads for one of any": ("__syncthreads_or", "__syncthreads_and"),
    "a vote of all lanes for one of any": ("__any_sync", "__all_sync"),
    "values of another lane": ("value, mask)", "value, mask ^ 3)"),
    "a lane taken for a thread": ("%%tid.x", "%%laneid"),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory, request):
    """The PTX of all that are tried, compiled in one go: each in a namespace of its own."""
    extension()  # skips where nothing can be compiled
    folder, source = tmp_path_factory.mktemp("mutants"), "#include <cuda_fp16.h>\nusing T = __half;\n"
    tried = {item.callspec.params["name"] for item in request.session.items if "mutants" in getattr(item, "fixturenames", ())}
    for number, (name, (old, new)) in enumerate(MUTANTS.items()):
        if name not in tried:
            continue
        copy = folder / f"wrong{number}"
        shutil.copytree(CSRC, copy)
        for path in copy.rglob("*.*h"):  # no two of them alike, or #pragma once takes them for one
            path.write_text(f"// {copy.name}\n{path.read_text()}")
        device = copy / "device" / "cuda.cuh"
        assert old in device.read_text()
        device.write_text(device.read_text().replace(old, new) if old else device.read_text())
        source += f'#define hlip {copy.name}\n#include "{copy}/short_attention/choice.cuh"\n{ONE_OF_EACH}#undef hlip\n'
    (folder / "mutants.cu").write_text(source)
    return ptx(folder / "mutants.cu", "80")


@pytest.mark.settles(*CUDA_KERNELS, packages=["nvcc"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(compiled, mutants, name):
    number = list(MUTANTS).index(name)
    run = lambda: one_of_each(compiled, mutants, torch.float16, f"wrong{number}")  # noqa: E731
    if number == 0:
        run()
    else:
        with pytest.raises((AssertionError, PtxError)):
            run()
