"""How the flash backend finds and calls real implementations: packages made up here, whose functions have the signatures of
real releases, so that a wrong keyword fails; torch's own against its real schema.

Signatures: flash-attn 2.8.3, flash-attn-3 3.0.0, flash-attn-4 4.0.0b36.
"""

import importlib.util
import subprocess
import sys
import textwrap
import threading
import warnings
from importlib.metadata import distribution

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hlip_kernels import info
from hlip_kernels.backends import Query
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.determinism import deterministic_algorithms
from hlip_kernels.backends.flash import FlashBackend
from hlip_kernels.backends.flash_implementations import (
    FlashAttn2,
    FlashAttn3,
    FlashAttn4,
    TorchFlash,
    best_first,
)

FLASH_ATTN_2 = """
    from typing import Optional, Tuple
    import torch
    CALLS = []

    @torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
    def _flash_attn_varlen_forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: Optional[torch.Tensor] = None, return_softmax: bool = False,
        block_table: Optional[torch.Tensor] = None, leftpad_k: Optional[torch.Tensor] = None,
        seqused_k: Optional[torch.Tensor] = None, zero_tensors: bool = False,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        CALLS.append(dict(locals()))
        return q + 1, torch.zeros(q.shape[1], q.shape[0]), q.new_empty(0), q.new_empty(2)

    @torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
    def _flash_attn_varlen_backward(
        dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, softmax_lse: torch.Tensor,
        dq: Optional[torch.Tensor], dk: Optional[torch.Tensor], dv: Optional[torch.Tensor],
        cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Optional[torch.Tensor], deterministic: bool, rng_state: Optional[torch.Tensor] = None,
        zero_tensors: bool = False,
    ) -> torch.Tensor:
        CALLS.append(dict(locals()))
        for n, grad in enumerate((dq, dk, dv)):
            grad.fill_(n + 1)
        return softmax_lse.clone()

    _wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
    _wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
"""

FLASH_ATTN_3 = """
    import torch
    CALLS = []
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
        "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None, "
        "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
        "Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, Tensor? rotary_cos = None, "
        "Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None, "
        "Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, "
        "int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, bool is_rotary_interleaved = False, "
        "Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) "
        "-> (Tensor(out!), Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
        "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
        "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
        "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
        "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def fwd(*args, **kwargs):
        names = [a.name for a in torch.ops.flash_attn_3.fwd.default._schema.arguments]
        CALLS.append(dict(zip(names, args)) | kwargs)
        q = args[0]
        return q + 1, torch.zeros(q.shape[1], q.shape[0]), q.new_empty(0), q.new_empty(0)

    def bwd(*args, **kwargs):
        names = [a.name for a in torch.ops.flash_attn_3.bwd.default._schema.arguments]
        CALLS.append(call := dict(zip(names, args)) | kwargs)
        for n, name in enumerate(("dq", "dk", "dv")):
            call[name].fill_(n + 1)
        return tuple(call["softmax_lse"].clone() for _ in range(5))

    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
"""

FLASH_ATTN_4 = """
    import torch
    CALLS = []

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
        k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):
        CALLS.append(dict(locals()))
        lse = torch.zeros(q.shape[1], q.shape[0]) if return_lse else None
        return q + 1, lse, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):
        CALLS.append(dict(locals()))
        return tuple(torch.full_like(t, n + 1) for n, t in enumerate((q, k, v)))
"""


def install(folder, name, version, modules):
    """A distribution as pip leaves it: modules by path, and its name and version."""
    for path, source in modules.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(source))
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def ours():
    """The modules of the made up packages that are imported."""
    return [n for n in sys.modules if n.split(".")[0] in ("flash_attn", "flash_attn_interface")]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder to install into, first on the path; what is imported from it is forgotten."""
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("flash_attn_interface"):
        pytest.skip("the real ones are here; tests/test_gpu_flash.py runs them")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ours():
        del sys.modules[name]


@pytest.fixture(scope="session")  # pytest-xdist may deal a process this file's tests with other files' between them
def site(tmp_path_factory):
    """All three, side by side in one folder as pip puts them; and their modules, once imported."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "flash-attn", "2.8.3", {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": FLASH_ATTN_2})
    install(folder, "flash_attn_3", "3.0.0", {"flash_attn_interface.py": FLASH_ATTN_3})
    install(folder, "flash-attn-4", "4.0.0b36", {"flash_attn/cute/interface.py": FLASH_ATTN_4})
    (folder / "flash_attn/cute/__init__.py").write_text("")
    return folder, {}


@pytest.fixture
def packages(alone, site, monkeypatch):
    """All three, to be imported; each only once, since torch keeps the ops that they register."""
    folder, imported = site
    monkeypatch.syspath_prepend(folder)
    sys.modules.update(imported)
    yield folder
    imported.update({name: sys.modules[name] for name in ours()})


KINDS = [(FlashAttn2, "flash_attn.flash_attn_interface"), (FlashAttn3, "flash_attn_interface"),
         (FlashAttn4, "flash_attn.cute.interface")]  # fmt: skip


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind, module", KINDS, ids=lambda x: getattr(x, "name", None))
def test_calls_fit_the_signatures_of_the_releases(packages, kind, module, deterministic):
    implementation = kind()
    assert implementation.why_not((9, 0), 64, True) == "" and module in sys.modules
    calls = sys.modules[module].CALLS
    calls.clear()
    q, k, v, g, o = (torch.randn(7, 2, 8) for _ in range(5))
    lse, offsets = torch.randn(2, 7), torch.tensor([0, 3, 7], dtype=torch.int32)
    out, got_lse = implementation.forward(q, k, v, offsets, 4, 0.3)
    assert torch.equal(out, q + 1) and got_lse.shape == (2, 7)
    grads = implementation.backward(g, q, k, v, o, lse, offsets, 4, 0.3, deterministic)
    assert [float(t.unique()) for t in grads] == [1, 2, 3] and all(t.shape == q.shape for t in grads)
    forward, backward = calls
    for call in calls:
        for name, wanted in (("q", q), ("k", k), ("v", v), ("cu_seqlens_q", offsets), ("cu_seqlens_k", offsets)):
            assert call[name] is wanted or torch.equal(call[name], wanted), name
        assert call["max_seqlen_q"] == call["max_seqlen_k"] == 4 and call["softmax_scale"] == 0.3
        assert not call.get("causal", call.get("is_causal")) and not call.get("softcap") and not call.get("dropout_p")
        assert call.get("window_size_left") in (None, -1) and call.get("window_size_right") in (None, -1)
    assert not forward.get("return_softmax")
    assert torch.equal(backward["dout"], g) and torch.equal(backward["out"], o)
    assert torch.equal(backward["lse" if kind is FlashAttn4 else "softmax_lse"], lse)
    assert backward.get("deterministic", False) is deterministic  # torch leaves out what is a default


@pytest.mark.parametrize(
    "capability, head_dim, deterministic, name",
    [
        ((8, 0), 64, True, "flash-attn 2"),
        ((8, 9), 256, False, "flash-attn 2"),
        ((9, 0), 64, True, "flash-attn 4"),
        ((9, 0), 256, True, "flash-attn 4"),
        ((9, 0), 256, False, "flash-attn 4"),
        ((10, 0), 128, True, "flash-attn 4"),
        ((10, 0), 136, True, "flash-attn 2"),
        ((11, 0), 64, True, "flash-attn 4"),
        ((12, 0), 64, True, "flash-attn 2"),
        ((12, 0), 64, False, "flash-attn 4"),
    ],
)
def test_the_best_that_can(packages, monkeypatch, capability, head_dim, deterministic, name):
    query = Query("cuda", capability, torch.bfloat16, head_dim, numerics=Numerics(deterministic=deterministic))
    backend = FlashBackend()
    chosen = backend.implementation(query)
    assert chosen.name == name
    assert dict(backend.reasons(query))[name] == ""
    # Without flash-attn 4 and 2: flash-attn 3 where it can, else torch's own.
    fewer = FlashBackend()
    fewer.implementations = tuple(i for i in best_first() if i.name not in ("flash-attn 4", "flash-attn 2"))
    can_3 = capability == (9, 0) and (head_dim <= 192 or not deterministic)
    assert fewer.implementation(query).name == ("flash-attn 3" if can_3 else "torch")


def test_torchs_switch_counts_as_asking_for_the_same_bits(packages):
    query = Query("cuda", (12, 0), torch.bfloat16, 64, numerics=Numerics(deterministic=False))
    torch.use_deterministic_algorithms(True)
    try:
        assert FlashBackend().implementation(query).name == "flash-attn 2"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind, name, module", [
    (FlashAttn2, "flash-attn", "flash_attn/flash_attn_interface.py"),
    (FlashAttn3, "flash-attn-3", "flash_attn_interface.py"),
    (FlashAttn4, "flash-attn-4", "flash_attn/cute/interface.py"),
], ids=lambda x: getattr(x, "name", None))  # fmt: skip
def test_versions(alone, kind, name, module):
    marker = alone / "imported"
    source = f"open({str(marker)!r}, 'w')\nraise OSError('libcudart.so.11: no such file\\nsecond line')"
    old = {"flash-attn": "2.6.3", "flash-attn-3": "2.9", "flash-attn-4": "4.0.0b9"}[name]
    new = {"flash-attn": "3.0.0", "flash-attn-3": "4.0.0", "flash-attn-4": "5.0.0"}[name]
    good = {"flash-attn": "2.10.1.post1", "flash-attn-3": "3.1.0+cu130", "flash-attn-4": "4.0.0b28.dev3"}[name]
    assert kind().why_not((9, 0), 64, False) == "not installed" and kind().version() == ""
    for version in (old, new, good):
        install(alone, name, version, {module: source})
        importlib.invalidate_caches()
        why = kind().why_not((9, 0), 64, False)
        assert version in why, why
        if version == good:
            assert "OSError: libcudart.so.11: no such file" in why and "second" not in why and marker.exists()
        else:
            assert "can be called" in why and not marker.exists(), why
        for imported in ours():
            del sys.modules[imported]
        (alone / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA").unlink()
        (alone / f"{name.replace('-', '_')}-{version}.dist-info").rmdir()


def test_metadata_without_the_module_is_not_installed(alone):
    install(alone, "flash-attn", "2.8.3", {})
    importlib.invalidate_caches()
    assert distribution("flash-attn").version == "2.8.3"
    assert FlashAttn2().why_not((9, 0), 64, False) == "not installed"


def test_flash_attn_3_before_3_0_0_is_not_deterministic(alone):
    install(alone, "flash-attn-3", "3.0.0b1", {"flash_attn_interface.py": "raise ImportError('asked for too early')"})
    importlib.invalidate_caches()
    assert "3.0.0b1 is not deterministic" in FlashAttn3().why_not((9, 0), 64, True)
    assert "asked for too early" in FlashAttn3().why_not((9, 0), 64, False)
    assert "head dim 192" in FlashAttn3().why_not((9, 0), 200, True)
    assert "sm_90" in FlashAttn3().why_not((10, 0), 64, False)


def test_another_calling_convention_is_named(alone):
    changed = FLASH_ATTN_4.replace("deterministic=False, dq", "reproducible=False, dq")
    assert changed != FLASH_ATTN_4
    install(alone, "flash-attn-4", "4.0.0", {"flash_attn/cute/interface.py": changed})
    importlib.invalidate_caches()
    why = FlashAttn4().why_not((9, 0), 64, False)
    assert why == "4.0.0 is installed, but its _flash_attn_bwd does not take deterministic"


def test_importing_and_asking_about_a_cpu_imports_no_flash_attn(alone):
    install(alone, "flash-attn", "2.8.3", {"flash_attn/__init__.py": "raise RuntimeError('imported')"})
    script = """
        import sys, torch, hlip_kernels
        from hlip_kernels import Layout, attention
        from hlip_kernels.backends import BACKENDS, Query, explain
        layout = Layout.from_lengths([3, 5], levels=("scan",))
        attention(*torch.randn(3, 8, 2, 16).unbind(0), layout, "scan")
        explain(Query("cpu", None, torch.float32, 64))
        assert not [m for m in sys.modules if m.startswith("flash_attn")], "imported"
        assert "flash-attn 2: 2.8.3" not in str(BACKENDS["flash"].supports(Query("cuda", (9, 0), torch.float16, 20)))
        assert "hlip_kernels.backends.flash_rows" not in sys.modules
        assert dict(BACKENDS["flash"].reasons(Query("cuda", (9, 0), torch.float16, 64)))["flash-attn 2"].endswith("imported")
    """
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(alone)!r})\n" + textwrap.dedent(script)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_torchs_own_fits_its_schema():
    """On meta tensors: the op's own schema and shapes, without a GPU."""
    q, k, v, g, o = (torch.randn(7, 2, 8, device="meta", dtype=torch.float16) for _ in range(5))
    offsets = torch.zeros(3, dtype=torch.int32, device="meta")
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "flash" in str(function):
                names = [a.name for a in function._schema.arguments]
                mode = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
                seen.append((str(function), dict(zip(names, args, strict=False)) | (kwargs or {}), mode))
            return function(*args, **(kwargs or {}))

    with Watch(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = TorchFlash().forward(q, k, v, offsets, 4, 0.3)
        assert out.shape == q.shape and lse.shape == (2, 7) and lse.dtype == torch.float32
        for deterministic in (True, False):
            grads = TorchFlash().backward(g, q, k, v, o, lse, offsets, 4, 0.3, deterministic)
            assert [t.shape for t in grads] == [q.shape] * 3
    (name, forward, mode), *backwards = seen
    assert name == "aten._flash_attention_forward.default" and mode == (0, True)
    assert forward["query"] is q and forward["key"] is k and forward["value"] is v and forward["return_debug_mask"] is False
    assert [mode for _, _, mode in backwards] == [(2, False), (0, True)]
    for _, call, _ in backwards:
        assert (call["grad_out"], call["query"], call["key"], call["value"], call["out"]) == (g, q, k, v, o)
        assert call["logsumexp"] is lse
    for _, call, _ in seen:
        assert call["cum_seq_q"] is offsets and call["cum_seq_k"] is offsets and call["max_q"] == call["max_k"] == 4
        assert call["scale"] == 0.3 and call["is_causal"] is False and call["dropout_p"] == 0.0
    assert torch.get_deterministic_debug_mode() == 0 and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("fill", [True, False])
def test_the_switch_is_put_back(mode, fill):
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        with pytest.raises(KeyError), deterministic_algorithms():
            assert torch.get_deterministic_debug_mode() == 2
            # Who asked for unwritten memory to be filled still gets it; who did not loses no time over it.
            assert torch.utils.deterministic.fill_uninitialized_memory == (fill and mode > 0)
            raise KeyError
        assert torch.get_deterministic_debug_mode() == mode
        assert torch.utils.deterministic.fill_uninitialized_memory == fill
    finally:
        torch.set_deterministic_debug_mode(0)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_two_threads_do_not_put_back_each_others_setting():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def first():
        with deterministic_algorithms():
            inside.set()
            leave.wait(10)

    def second():
        inside.wait(10)
        with deterministic_algorithms():
            seen.append(torch.get_deterministic_debug_mode())

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    threads[1].join(0.2)
    assert not seen  # it waits
    leave.set()
    for thread in threads:
        thread.join(10)
    assert seen == [2] and torch.get_deterministic_debug_mode() == 0


def test_torchs_own_steps_back_where_something_took_its_place(monkeypatch):
    assert TorchFlash().why_not((9, 0), 64, True) == ""
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    assert "replaced it by FA3" in TorchFlash().why_not((9, 0), 64, True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without" in TorchFlash().why_not((9, 0), 64, True)


def test_info_shows_which_one(alone):
    report = info.report()
    assert f"torch {torch.__version__}: would be used" in report
    assert "flash-attn 4: not installed" in report
    install(alone, "flash-attn-4", "4.0.0b36", {"flash_attn/cute/interface.py": FLASH_ATTN_4})
    importlib.invalidate_caches()
    lines = info.flash_attention(Query("cuda", (9, 0), torch.bfloat16, 64), FlashBackend())
    assert "flash-attn 4 4.0.0b36: would be used" in lines
    assert f"torch {torch.__version__}: could be used" in lines
