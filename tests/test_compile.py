"""``torch.compile`` in parts: blocks one by one, graph breaks, layouts made between graphs, rows that a graph writes into."""

import inspect
import subprocess
import sys

import pytest
import torch
from attention_truth import LEVELS, RAGGED, make, relative
from torch._dynamo.testing import CompileCounterWithBackend

from hlip_kernels import HierarchicalAttention, Layout, segment_mean, switch_level


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


def assert_same(compiled, plain, inputs):
    """Results and gradients of ``inputs`` through them, with weights that tell rows apart."""
    results = []
    for run in (plain, compiled):
        outs = run()
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum((out.sin() * torch.linspace(1, 2, out.numel()).view(out.shape)).sum() for out in outs)
        results.append((*outs, *torch.autograd.grad(loss, inputs)))
    for expected, got in zip(*results, strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", None)])
@pytest.mark.parametrize("old, new", [("slice", "study"), ("study", "scan")])
def test_switch_level_writes_into_the_input_of_a_compiled_graph(backend, dynamic, old, new):
    layout = make(RAGGED, 2, 8)
    f = lambda x: switch_level(x, layout, old, new) * 2  # noqa: E731
    compiled = torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)
    x = torch.randn(layout.num_rows, 3, requires_grad=True)

    def mutated(f):  # both what the graph returns and what it wrote into count
        y = x.square()
        return f(y), y

    assert_same(lambda: mutated(compiled), lambda: mutated(f), [x])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_switch_level_in_a_compiled_graph_writes_without_gradients(backend):
    layout = make(RAGGED, 1)
    compiled = torch.compile(lambda x: switch_level(x, layout, "slice", "scan"), backend=backend, fullgraph=True)
    x = torch.randn(layout.num_rows, 3)
    expected = switch_level(x, layout, "slice", "scan", inplace=False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = x.clone()
            compiled(y)
            torch.testing.assert_close(y, expected)


def test_switch_level_over_what_a_gradient_needs_is_an_error_compiled_too():
    layout = make(RAGGED, 1)

    def f(x, inplace):
        before = x.square()
        return before, switch_level(x, layout, "slice", "study", inplace=inplace).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x = torch.randn(layout.num_rows, 3, requires_grad=True)
    for run in (f, compiled):
        with pytest.raises(Exception, match="modified by an inplace operation"):
            torch.autograd.grad(run(x * 1, inplace=True)[0].sum(), x)
    assert_same(lambda: compiled(x, inplace=False), lambda: f(x, inplace=False), [x])


class Block(torch.nn.Module):
    def __init__(self, old, new):
        super().__init__()
        self.old, self.new = old, new
        self.norm = torch.nn.LayerNorm(16)
        self.attn = HierarchicalAttention(16, 2)

    def forward(self, x, layout):
        x = switch_level(x, layout, self.old, self.new)
        return x + self.attn(self.norm(x), layout, self.new)


class Net(torch.nn.Module):
    """Blocks that begin by writing into the rows of the one before, with a graph break between them if asked."""

    def __init__(self, broken=False):
        super().__init__()
        self.first = torch.nn.Linear(16, 16)
        self.blocks = torch.nn.ModuleList([Block("slice", "scan"), Block("scan", "study"), Block("study", "slice")])
        self.broken = broken

    def forward(self, x, layout):
        x = self.first(x)
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()
            x = block(x, layout)
        return segment_mean(x, layout, "study"), x[layout.prefix_rows("slice")]


@pytest.mark.parametrize(
    "how, backend",
    [(how, "aot_eager") for how in ("whole", "broken", "one by one", "around a hook")] + [("broken", "inductor")],
)
def test_a_model_compiled_in_parts_has_its_gradients(backend, how):
    layout = make(RAGGED, 2)
    net = Net(broken=how == "broken")
    x = torch.randn(layout.num_rows, 16)
    rows = []
    for _ in range(2):  # the second time, as compiled
        outs = net(x, layout)
        loss = sum((out.sin() * torch.linspace(1, 2, out.numel()).view(out.shape)).sum() for out in outs)
        rows.append((*outs, *torch.autograd.grad(loss, list(net.parameters()))))
        if how == "one by one":
            for block in net.blocks:
                block.compile(backend=backend, dynamic=True)
        else:
            if how == "around a hook":  # dynamo runs what it may not look into, and compiles what is before and after
                for block in net.blocks:
                    block.register_forward_hook(torch.compiler.disable(lambda module, args, out: None))
            net.compile(backend=backend, dynamic=True)
    for expected, got in zip(*rows, strict=True):
        assert relative(got, expected) < 1e-4


class Dropping(torch.nn.Module):
    """Builds a layout, drops rows of it, and asks for a pattern, all in its forward pass."""

    def __init__(self):
        super().__init__()
        self.attn = HierarchicalAttention(16, 2, neighbours=1)

    def forward(self, x, lengths, keep):
        layout = Layout.from_lengths(lengths, num_prefix=1, levels=LEVELS).to(x.device)
        patches, prefixes = x.split([layout.num_tokens, x.shape[0] - layout.num_tokens])
        dropped = layout.drop(keep)
        x = self.attn(torch.cat([patches[keep], prefixes]), dropped, "slice")
        return segment_mean(switch_level(x, dropped, "slice", "study"), dropped, "study")


@pytest.mark.parametrize("build", [Layout.from_lengths, Layout.from_grids, Layout.from_offsets], ids=lambda f: f.__name__)
def test_a_layout_built_in_a_compiled_function_breaks_the_graph(build):
    shape = {"from_lengths": [[[6, 6], [6]]], "from_grids": [[(2, 2, 3), (1, 2, 3)]], "from_offsets": {"slice": [0, 6, 12, 18]}}

    def f(x):
        layout = build(shape[build.__name__])
        return segment_mean(x.sin(), layout, "slice").cos()

    x = torch.randn(18, 3)
    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(x), f(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="built on the host"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(x)


def test_a_model_that_drops_rows_compiles_in_parts_and_not_for_ever():
    model, counter, counts = Dropping(), CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for lengths in ([[[5, 3], [17]], [[2, 9, 4]]], [[[7, 3], [16]], [[2, 8, 4], [3]]], RAGGED, [[[64] * 3] * 2] * 5):
        rows = make(lengths, 1)
        keep = torch.arange(rows.num_tokens) % 3 > 0
        x = torch.randn(rows.num_rows, 16, requires_grad=True)
        assert_same(lambda: compiled(x, lengths, keep), lambda: model(x, lengths, keep), [x])  # noqa: B023
        counts.append(counter.frame_count)
    assert counts[-1] == counts[-2], counts


SUMS = {
    "lengths": lambda x, layout: segment_mean(x, layout, "scan") * layout.lengths("scan")[:, None],
    "repeated": lambda x, layout: torch.repeat_interleave(layout.lengths("scan"), output_size=layout.num_tokens),
    "diff": lambda x, layout: (layout.offsets("scan").diff(), layout.children("slice", "study").diff()),
}


@pytest.mark.parametrize("name", SUMS)
def test_lengths_and_differences_compile_whole_and_once(name):
    if name == "diff" and "min" not in inspect.signature(torch._dynamo.decorators.mark_unbacked).parameters:
        pytest.skip("this torch cannot be told that a table has an entry; lengths() does not need it")
    f, counter = SUMS[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([[[5, 3], [17]], [[2, 9, 4]]], [[[7, 3], [16]], [[2, 8, 4], [3]]], RAGGED, [[[64] * 3] * 2] * 5):
        layout = make(lengths, 1)
        x = torch.randn(layout.num_rows, 7)
        torch.testing.assert_close(compiled(x, layout), f(x, layout))
        assert counter.frame_count == 1


def run_alone(code):
    """In a process of its own, in which nothing has loaded dynamo."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_layout_does_not_load_dynamo():
    run_alone("""
import copy, pickle, sys
import numpy as np
from hlip_kernels import Layout

layout = Layout.from_grids([[(2, 2, 2), (1, 2, 2)]], num_prefix=1)
layout.pattern("slice", neighbours=1)
pickle.loads(pickle.dumps(layout.drop(np.arange(12) % 2 > 0)))
layout.to("meta")
assert "torch._dynamo" not in sys.modules
""")


def test_layouts_made_before_dynamo_was_loaded_compile_once():
    run_alone("""
import sys
from hlip_kernels import Layout

# Some tables of the first are equally long, and not those of the next.
batches = [[[[5, 3], [17]], [[2, 9, 4]]], [[[7, 3], [16]], [[2, 8, 4], [3]]], [[[64] * 3] * 2] * 5]
layouts = [Layout.from_lengths(batch, num_prefix=2, row_multiple=16) for batch in batches]
assert "torch._dynamo" not in sys.modules
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from hlip_kernels import HierarchicalAttention, segment_mean, switch_level

layer, counter = HierarchicalAttention(16, 2), CompileCounterWithBackend("aot_eager")

def f(x, layout):
    x = switch_level(layer(x, layout, "slice"), layout, "slice", "study")
    return segment_mean(layer(x, layout, "study"), layout, "study")

compiled, counts = torch.compile(f, backend=counter, fullgraph=True, dynamic=True), set()
for layout in layouts:
    x = torch.randn(layout.num_rows, 16)
    torch.testing.assert_close(compiled(x, layout), f(x, layout))
    counts.add(counter.frame_count)
assert len(counts) == 1, counts
""")


def test_a_layout_first_built_in_a_whole_graph_says_why_not():
    run_alone("""
import torch
from hlip_kernels import Layout

try:
    torch.compile(lambda x: x[Layout.from_lengths([3]).prefix_rows("segment")], backend="eager", fullgraph=True)(torch.ones(3))
except Exception as error:
    assert "built on the host" in str(error), error
else:
    raise AssertionError("no error")
""")
