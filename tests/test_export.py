"""``torch.export``: a module that holds a layout, and one that takes its tables, with lengths that change."""

import io
from pathlib import Path

import pytest
import torch
from attention_truth import RAGGED, make

from hlip_kernels import HierarchicalAttention, Layout, segment_mean, switch_level
from hlip_kernels.exported import ExportedLayout, export_tables

PATTERN = {"neighbours": 1, "summary": "study"}
BATCHES = [
    [[[5, 3], [17]], [[2, 9, 4]]],
    [[[7, 3], [16]], [[2, 8, 4], [3]], [[5, 6]]],
    RAGGED,
    [[[64] * 3] * 2] * 5,
    [[[30], [3]]],  # one study
]


class Net(torch.nn.Module):
    """Levels, patterns, a change of level, lengths and a pooled result."""

    def __init__(self, layout=None):
        super().__init__()
        self.a, self.b = HierarchicalAttention(16, 2, **PATTERN), HierarchicalAttention(16, 2)
        self.layout = layout

    def forward(self, x, tables=None):
        layout = self.layout if tables is None else ExportedLayout(tables)
        x = x + self.a(x, layout, "slice")
        x = switch_level(x, layout, "slice", "study")
        x = x + self.b(x, layout, "study")
        return x, segment_mean(x, layout, "scan") * layout.lengths("scan")[:, None], x[layout.prefix_rows("study")]


def batch(lengths, num_prefix=2, **options):
    layout = make(lengths, num_prefix, **options)
    layout.pattern("slice", **PATTERN)
    return torch.randn(layout.num_rows, 16, requires_grad=True), layout


def assert_same(program, net, x, layout, *tables):
    net.layout = layout
    results = []
    for run, args in ((program, tables), (net, ())):
        outs = run(x * 1, *args)
        results.append((*outs, *torch.autograd.grad(sum(out.sin().sum() for out in outs), x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def test_a_module_that_holds_a_layout():
    x, layout = batch(RAGGED)
    net = Net(layout)
    program = torch.export.export(net, (x,))
    for each in (program, saved_and_loaded(program)):
        each = each.module()
        each.load_state_dict(net.state_dict())
        assert_same(each, net, x, layout)


def test_tables_are_inputs_of_any_lengths():
    net = Net()
    first, *others = [(x, export_tables(layout)) for x, layout in (batch(lengths) for lengths in BATCHES[:2])]
    more = torch.export.AdditionalInputs()
    for other in others:
        more.add(other)
    program = torch.export.export(net, first, dynamic_shapes=more)
    modules = [program.module(), saved_and_loaded(program).module()]
    for lengths in BATCHES:
        x, layout = batch(lengths)
        for module in modules:
            assert_same(module, net, x, layout, export_tables(layout))
    x, layout = batch(RAGGED, num_prefix=3)
    with pytest.raises(AssertionError, match="Guard failed: .*num_prefix"):
        modules[0](x, export_tables(layout))
    # As documented: of one scan, of which torch would have to know that lengths are not broadcast.
    x, layout = batch([[[30, 3]]])
    with pytest.raises(AssertionError, match="Guard failed: .*num_segments.1'. != 1"):
        modules[0](x, export_tables(layout))


def test_the_documented_lines_run():
    page = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "export_tables" in block]
    names = {}
    exec(compile(code, "docs/layout.md", "exec"), names)
    program = names["program"].module()
    assert names["out"].shape == names["batches"][1][0].shape
    for grids in ([[(3, 4, 5)], [], [(1, 2, 2)] * 4], [[(3, 2, 2)]]):
        layout = Layout.from_grids(grids, num_prefix=1)
        x = torch.randn(layout.num_rows, 64)
        assert program(x, export_tables(layout)).shape == x.shape


def test_an_exported_layout_says_what_it_lacks():
    x, layout = batch(RAGGED)
    exported = ExportedLayout(export_tables(layout))
    assert "slice" in repr(exported) and isinstance(exported, Layout)
    assert torch.equal(segment_mean(x, exported, "scan"), segment_mean(x, layout, "scan"))
    for ask in (
        lambda: exported.grids,
        lambda: exported.max_len("scan"),
        lambda: exported.host_offsets("scan"),
        lambda: exported.pattern("scan", neighbours=3),
        lambda: exported.to("meta"),
    ):
        with pytest.raises(AttributeError, match="an exported layout has tables only, and no .*use the layout itself"):
            ask()
    with pytest.raises(AttributeError, match="frozen"):
        exported.num_rows = 3
    with pytest.raises(ValueError, match="of 3 levels, got the names 'a', 'b'"):
        ExportedLayout(export_tables(layout), ("a", "b"))
    with pytest.raises(TypeError, match="what export_tables.layout. returns, got Layout"):
        ExportedLayout(layout)


def test_a_pattern_that_was_not_built_says_so():
    layout = make(RAGGED, 2)
    with pytest.raises(RuntimeError, match="not built yet"):
        torch.export.export(Net(), (torch.randn(layout.num_rows, 16), export_tables(layout)))
