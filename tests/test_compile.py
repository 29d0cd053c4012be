"""``torch.compile`` in parts: blocks one by one, graph breaks, and rows that a compiled graph is given and writes into."""

import pytest
import torch
from attention_truth import RAGGED, make, relative

from hlip_kernels import HierarchicalAttention, segment_mean, switch_level


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
