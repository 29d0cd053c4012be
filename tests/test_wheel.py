"""One wheel for every torch: what ``pip wheel .`` makes holds the CUDA extension, knows nothing of torch, and works beside the
torch that is installed and beside another one.

The other is the folder in HLIP_SECOND_TORCH (made by ``pip install torch==VERSION --no-deps --target FOLDER``; what that torch
needs is taken from here), or is installed for the occasion where that takes no more than two minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from cuda_toolkit import ToolError, find_nvcc  # noqa: E402

filelock = pytest.importorskip("filelock")  # torch needs it too

SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "hlip", "hlip_kernels")
INSTALLED = torch.__version__.split("+")[0]
SECOND = next(version for version in ("2.13.0", "2.12.0") if version != INSTALLED)
# Libraries of the C++ compiler and of the system: what any Linux has. All else would have to come from somewhere.
SYSTEM = r"(linux-vdso|ld-linux[\w-]*|libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+)\.so\.\d+"


def clean_environment(**more) -> dict:
    """The environment, without what would lead a subprocess to other packages than those it is meant to see."""
    dropped = ("PYTHONPATH", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if k not in dropped} | more


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of a wheel, built once for all workers of pytest-xdist."""
    try:
        find_nvcc()
    except ToolError as error:
        pytest.skip(str(error))
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()
    with filelock.FileLock(folder / "wheel.lock"):
        found = list(folder.glob("wheel/*.whl"))
        if not found:
            found = build_wheel(folder)
    assert len(found) == 1, found
    return found[0]


def build_wheel(folder: Path) -> list[Path]:
    # Not in the checkout: its build folder may be in use, or hold files that are no longer in the sources.
    source = folder / "wheel-source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_note.txt")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "--wheel-dir", str(folder / "wheel"), str(source)]
    needed = "import setuptools, pybind11; assert int(setuptools.__version__.split('.')[0]) >= 77"
    here = subprocess.run([sys.executable, "-c", needed], capture_output=True).returncode == 0
    if here and shutil.which("cmake") and shutil.which("ninja"):
        command.append("--no-build-isolation")
    # The GPU's code is never run here, so it need not be fast: this halves the time it takes to make.
    fast = " ".join(filter(None, [os.environ.get("NVCC_APPEND_FLAGS"), "-Xcicc=-O0 -Xptxas=-O0"]))
    environment = clean_environment(HLIP_BUILD_CUDA="1", HLIP_CUDA_ARCHS="80", NVCC_APPEND_FLAGS=fast)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return list((folder / "wheel").glob("*.whl"))


@pytest.fixture
def unpacked(wheel, tmp_path):
    """A folder with what the wheel holds, as an installation has it."""
    folder = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def extension_of(folder: Path) -> Path:
    (found,) = (folder / "hlip_kernels").glob("_C*")
    assert found.name == "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    return found


def test_what_is_in_the_wheel(wheel, unpacked):
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.endswith(f"-{python}-{python}-{platform}.whl")
    (info,) = unpacked.glob("*.dist-info")
    assert {p.name for p in unpacked.iterdir()} == {"hlip", "hlip_kernels", info.name}
    text = (info / "WHEEL").read_text()
    assert "Root-Is-Purelib: false" in text and f"Tag: {python}-{python}-{platform}" in text
    torches = re.findall(r"^Requires-Dist: (torch\b(?!vision).*)$", (info / "METADATA").read_text(), flags=re.M)
    assert torches == ["torch>=2.11"]
    assert (unpacked / "hlip_kernels" / "_build_note.txt").read_text() == "built\n"
    assert b"sm_80" in extension_of(unpacked).read_bytes()
    assert list((unpacked / "hlip").rglob("*.yaml"))
    # All modules of both packages, and none that are not in the sources.
    source = wheel.parent.parent / "wheel-source"
    ours = {p.relative_to(source) for name in ("hlip", "hlip_kernels") for p in (source / name).rglob("*.py")}
    assert {p.relative_to(unpacked) for p in unpacked.rglob("*.py")} == ours


def test_the_extension_asks_nothing_of_torch_or_the_cuda_runtime(unpacked):
    extension = extension_of(unpacked)
    linked = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
    libraries = [line.split()[0].rpartition("/")[2] for line in linked.splitlines()]
    assert libraries and all(re.fullmatch(SYSTEM, library) for library in libraries), linked
    undefined = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", extension], capture_output=True, text=True, check=True
    ).stdout
    assert " PyBaseObject_Type" in undefined  # it does list what is undefined
    foreign = re.findall(
        r"^.*(?:\b(?:torch|c10|caffe2|pybind11)::|(?<![\w:])at::|THP| _?_?cu[a-z]*[A-Z]).*$", undefined, flags=re.M
    )
    assert not foreign, foreign


def test_the_extension_imports_where_there_is_no_torch(unpacked):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(extension_of(unpacked))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert importlib.util.find_spec('torch') is None and 'numpy' not in sys.modules\n"
        "print(module.architectures, module.Type.float16)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "80"


PROBE = """
import json
import torch
import hlip_kernels
from hlip_kernels import Layout, attention, native, segment_mean
from hlip_kernels.info import report
from hlip_kernels.ops.segment_mean import torch_segment_mean

assert not native.why_missing(), native.why_missing()
torch.manual_seed(0)
layout = Layout.from_grids([[(2, 5, 7), (3, 9, 9)], [], [(0, 2, 2), (1, 1, 1)]], num_prefix=2)
chunks, chunk_offsets = layout.chunks("scan")
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(layout.num_rows, 24).to(dtype)
    got = native.segment_mean(x, layout.offsets("scan"), chunks, chunk_offsets)
    expected = torch_segment_mean(x, layout.offsets("scan"), layout.num_tokens)
    assert got.shape == (4, 24) and got.abs().sum() > 0
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
q = torch.randn(layout.num_rows, 2, 16, requires_grad=True)
attention(q, q, q, layout, "slice").square().sum().backward()
assert q.grad.isfinite().all() and q.grad.abs().sum() > 0
assert "built for sm_80" in report()
print(json.dumps({"torch": torch.__version__, "torch_at": torch.__file__, "extension_at": native._C.__file__}))
"""


def probe(*folders) -> subprocess.CompletedProcess:
    """Runs the wheel's own code in a process that looks into these folders first."""
    environment = clean_environment(PYTHONPATH=os.pathsep.join(map(str, folders)))
    return subprocess.run([sys.executable, "-c", PROBE], env=environment, cwd=folders[0], capture_output=True, text=True)


def test_the_wheel_beside_the_installed_torch(unpacked):
    done = probe(unpacked)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["extension_at"]).is_relative_to(unpacked)
    assert found["torch"] == torch.__version__


def second_torch() -> Path:
    """A folder with a torch of another version; skips where there is none to be had."""
    given = os.environ.get("HLIP_SECOND_TORCH")
    if given:
        assert (Path(given) / "torch" / "__init__.py").exists(), f"HLIP_SECOND_TORCH={given}: there is no torch in that folder"
        return Path(given)
    # Kept between runs: it is large.
    name = f"hlip-torch-{SECOND}-{sys.implementation.cache_tag}-{os.getuid()}"
    kept = Path(tempfile.gettempdir()) / name
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=kept.parent) as folder:
            target = Path(folder) / "torch"
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--only-binary", ":all:"]
            command += ["--target", str(target), f"torch=={SECOND}"]
            how = "name a folder with another torch in HLIP_SECOND_TORCH"
            try:
                done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120)
            except subprocess.TimeoutExpired:
                pytest.skip(f"torch {SECOND} could not be installed within 120 s: {how}")
            if done.returncode != 0:
                pytest.skip(f"torch {SECOND} could not be installed ({done.stderr.strip()[-300:]}): {how}")
            # A build for GPUs asks for libraries that only come with the installed torch if both are of the same CUDA.
            code = "import torch; torch.ones(2).sum()"
            environment = clean_environment(PYTHONPATH=str(target))
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"torch {SECOND} does not import beside the packages here ({done.stderr.strip()[-300:]}): {how}")
            if not kept.exists():
                target.rename(kept)
    return kept


def test_the_wheel_beside_another_torch(unpacked):
    other = second_torch()
    done = probe(unpacked, other)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["extension_at"]).is_relative_to(unpacked) and Path(found["torch_at"]).is_relative_to(other)
    assert found["torch"].split("+")[0] != INSTALLED, "HLIP_SECOND_TORCH holds the version that is installed: name another"
