"""The build: what setup.py decides and says, and the extension that comes out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hlip_kernels import Layout, info, native
from hlip_kernels.packs import packs_of
from hlip_kernels.pattern import Plan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build():
    """setup.py as a module, without running a build."""
    setuptools = pytest.importorskip("setuptools")
    source = (ROOT / "setup.py").read_text()
    module = {"__file__": str(ROOT / "setup.py"), "__name__": "build"}
    original, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        exec(compile(source, "setup.py", "exec"), module)
    finally:
        setuptools.setup = original
    return module


def test_architectures_from_the_environment(build, monkeypatch):
    for given, expected in (("80;90", "80;90"), ("8.0, 9.0", "80;;90"), ("90a", "90a")):
        monkeypatch.setenv("HLIP_CUDA_ARCHS", given)
        assert [a for a in build["cuda_architectures"]().split(";") if a] == [a for a in expected.split(";") if a]


def test_architectures_without_a_gpu(build, monkeypatch):
    monkeypatch.delenv("HLIP_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build["cuda_architectures"]() == "80;90"


@pytest.mark.parametrize("setting, nvcc, words", [("0", "/bin/nvcc", "HLIP_BUILD_CUDA=0"), ("", None, "nvcc was not found")])
def test_leaving_the_extension_out_takes_one_line(build, setting, nvcc, words, tmp_path, monkeypatch, capsys):
    from setuptools import Distribution

    monkeypatch.setenv("HLIP_BUILD_CUDA", setting)
    build["find_nvcc"] = lambda: nvcc
    command = build["CMakeBuild"](Distribution())
    monkeypatch.setattr(command, "output_folder", lambda: tmp_path)
    command.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hlip-kernels:")]
    assert len(lines) == 1 and "left out" in lines[0] and words in lines[0]
    assert words in (tmp_path / "_build_note.txt").read_text()


def test_asking_for_the_extension_without_nvcc_fails(build, monkeypatch):
    from setuptools import Distribution

    monkeypatch.setenv("HLIP_BUILD_CUDA", "1")
    build["find_nvcc"] = lambda: None
    with pytest.raises(RuntimeError, match="HLIP_BUILD_CUDA=1.*nvcc was not found"):
        build["CMakeBuild"](Distribution()).run()


def test_the_extension_is_built_where_nvcc_is():
    reason = native.why_missing()
    if reason:
        assert "nvcc was not found" in reason or "HLIP_BUILD_CUDA=0" in reason, reason
        pytest.skip(reason)
    assert native.architectures() and native.nvcc_version()
    extension = Path(native._C.__file__).read_bytes()
    for arch in native.architectures():
        assert f"sm_{arch}".encode() in extension
    linked = subprocess.run(["ldd", native._C.__file__], capture_output=True, text=True).stdout
    assert "libtorch" not in linked and "libcudart" not in linked, linked


def test_info_says_what_is_there():
    text = info.report()
    for part in (
        f"torch {torch.__version__.split('+')[0]}",
        "attention backends",
        "reference",
        "sdpa",
        "triton",
        "CUDA extension",
    ):
        assert part in text, text
    done = subprocess.run([sys.executable, "-m", "hlip_kernels.info"], capture_output=True, text=True)
    assert done.returncode == 0 and "attention backends" in done.stdout


@pytest.mark.skipif(bool(native.why_missing()), reason="the CUDA extension is not built")
def test_info_names_the_types_of_every_kernel():
    types = set(native._C.Type.__members__)
    floats = {name for name in types if "float" in name}
    text = [line.strip() for line in info.report().splitlines()]
    for start, expected in (
        ("segment_mean, switch_level, forward", floats),
        ("patchify: voxels of", types),
        ("backward: voxels of", floats),
    ):
        (line,) = [line for line in text if line.startswith(start)]
        assert set(re.findall(r"\w*(?:float|int)\d+", line)) == expected


def test_import_needs_neither_triton_nor_the_model_packages():
    hidden = ("triton", "timm", "open_clip", "transformers", "SimpleITK", "pydicom", "hlip_kernels._C")
    code = (
        "import sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "import torch, hlip_kernels, hlip\n"
        "from hlip_kernels import Layout, attention\n"
        "layout = Layout.from_lengths([3, 5])\n"
        "q = torch.randn(8, 2, 16)\n"
        "attention(q, q, q, layout, 'segment')\n"
        "from hlip_kernels.info import report\n"
        "assert 'triton is not installed' in report()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_kernels_does_not_import_triton_or_hlip():
    code = "import sys, hlip_kernels; assert 'hlip' not in sys.modules; print('triton' in sys.modules)"
    plain = "import sys, torch; print('triton' in sys.modules)"
    with_ours, without = (subprocess.run([sys.executable, "-c", c], capture_output=True, text=True) for c in (code, plain))
    assert with_ours.returncode == 0, with_ours.stderr
    assert with_ours.stdout == without.stdout


@pytest.mark.skipif(bool(native.why_missing()), reason="the CUDA extension is not built")
def test_gpu_kernels_refuse_memory_of_the_host():
    plan = Plan.of(Layout.from_lengths([5, 3], levels=("slice",)).pattern("slice"))
    q = torch.randn(8, 2, 64).half()
    with pytest.raises(RuntimeError, match="short_attention_forward failed: it runs on GPUs only.*head dim 64, 2 heads"):
        native.short_attention_forward(q, q, q, packs_of(plan, q.device), 0.1)
    with pytest.raises(RuntimeError, match="no kernel for head dim 48"):
        wide = torch.randn(8, 2, 48).half()
        native.short_attention_forward(wide, wide, wide, packs_of(plan, q.device), 0.1)
