"""The layer, the encoder and a training step: ragged packed rows against the published way of doing the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import workloads
from benchmarks.dense import DenseEncoder, published_batch
from benchmarks.measure import device, dtype, full_size, relative_error, run, tolerance
from benchmarks.peers import segment_rows
from hlip.losses import ContrastiveLoss
from hlip.model import StudyBatch, create_model
from hlip.model.variants import BIOMEDBERT, Encoder, Variant
from hlip_kernels import HierarchicalAttention

MODEL_WORKLOADS = ("chest_ct", "brain_mri_h3", "uncurated_mri", "long_tail")


class DenseLayer(nn.Module):
    """timm-style attention over segments padded to the longest, gathered and scattered around it."""

    def __init__(self, layer: HierarchicalAttention, w: workloads.Workload, level: str):
        super().__init__()
        self.layer = layer
        rows = segment_rows(w, level)
        longest = max(map(len, rows))
        self.lengths = torch.tensor([len(r) for r in rows], device=device())
        index = torch.zeros(len(rows), longest, dtype=torch.int64)
        for s, r in enumerate(rows):
            index[s, : len(r)] = torch.from_numpy(r)
        self.index = index.to(device())
        self.mask = (torch.arange(longest, device=device()) < self.lengths[:, None])[:, None, None, :]
        if len(set(map(len, rows))) == 1:
            self.mask = None

    def forward(self, x):
        dense = x[self.index]
        qkv = self.layer.qkv(dense).unflatten(-1, (3, self.layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=self.mask).transpose(1, 2).flatten(2)
        out = self.layer.proj(out)
        if self.mask is None:
            return torch.zeros_like(x).index_copy(0, self.index.flatten(), out.flatten(0, 1))
        keep = self.mask[:, 0, 0]
        return torch.zeros_like(x).index_copy(0, self.index[keep], out[keep])


@pytest.mark.parametrize("implementation", ["hlip", "padded SDPA"])
@pytest.mark.parametrize("name, level", [(n, lv) for n in workloads.NAMES for lv in workloads.make(n, full=full_size()).levels])
def test_layer(benchmark, workload, name, level, implementation):
    """One attention layer with its projections, forward and backward."""
    w = workload(name)
    torch.manual_seed(0)
    layer = HierarchicalAttention(w.dim, w.heads, qkv_bias=True, device=device(), dtype=dtype())
    layout = w.layout.to(device())
    x = torch.randn(w.layout.num_rows, w.dim, device=device(), dtype=dtype(), requires_grad=True)
    live = w.layout.prefix_rows(level).stop
    dense = DenseLayer(layer, w, level)
    with torch.no_grad():
        assert relative_error(layer(x, layout, level)[:live], dense(x)[:live]) < 4 * tolerance()

    def call():
        out = layer(x, layout, level) if implementation == "hlip" else dense(x)
        out[:live].sum().backward()
        x.grad = None

    projections = 2 * 4 * w.dim**2 * w.layout.num_rows
    benchmark.group = f"layer, {name} {level}"
    run(
        benchmark, call, flops=3 * projections + 3.5 * w.attention_flops(level),
        what="layer", part="forward and backward", workload=name, level=level, implementation=implementation,
    )  # fmt: skip


def _encoder(w: workloads.Workload) -> tuple[Encoder, list[list[torch.Tensor]]]:
    """A ViT of the workload's width and levels, and uint8 scans of its grids (16 x 16 x 4 voxels a patch)."""
    levels = w.levels if len(w.levels) > 1 else ("scan", "study")
    depth = 12 if w.full else 3
    prefix = ("cls", "reg")[: w.layout.num_prefix]
    encoder = Encoder(
        (32, 224, 224), (4, 16, 16), tuple(levels[i % len(levels)] for i in range(depth)), width=w.dim, heads=w.heads,
        prefix=prefix, pool="dinotxt", drop_path=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    studies = [
        [torch.randint(0, 256, (d * 4, h * 16, w_ * 16), dtype=torch.uint8, generator=generator) for d, h, w_ in study]
        for study in w.layout.grids
    ]
    return encoder, studies


def _model(encoder: Encoder):
    torch.manual_seed(0)
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 512}
    config = Variant(encoder, 128, token_axis=True, dual=False, text_model=BIOMEDBERT)
    return create_model(config, text=text).to(device())


@pytest.mark.parametrize("implementation", ["hlip", "published path"])
@pytest.mark.parametrize("name", MODEL_WORKLOADS)
def test_encoder(benchmark, workload, name, implementation):
    """The image encoder on uint8 voxels, forward, without gradients."""
    w = workload(name)
    encoder, studies = _encoder(w)
    model = _model(encoder).eval()
    batch = StudyBatch.pack(studies).to(device())
    dense = DenseEncoder(model.visual.trunk)
    rectangular = published_batch(studies, device())
    call = (lambda: model.visual.trunk(batch)) if implementation == "hlip" else (lambda: dense(rectangular))
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
        if len({tuple(s.shape) for study in studies for s in study}) == 1 and len({len(s) for s in studies}) == 1:
            assert relative_error(model.visual.trunk(batch), dense(rectangular)) < 10 * tolerance()
        benchmark.group = f"encoder, {name}"
        run(
            benchmark, call, rounds=10 if w.full else 3,
            what="encoder", part="forward", workload=name, level="all", implementation=implementation,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", ["hlip", "published path"])
@pytest.mark.parametrize("name", MODEL_WORKLOADS)
def test_training_step(benchmark, workload, name, implementation):
    """Forward, CLIP loss, backward and AdamW, on studies and short texts."""
    w = workload(name)
    encoder, studies = _encoder(w)
    model = _model(encoder).train()
    tokens = torch.randint(5, 512, (len(studies), 32), device=device())
    loss = ContrastiveLoss("clip")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dense = DenseEncoder(model.visual.trunk)
    batch = StudyBatch.pack(studies).to(device())
    rectangular = published_batch(studies, device())

    def call():
        with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
            if implementation == "hlip":
                image = model.encode_image(batch, normalize=True)
            else:
                image = F.normalize(model.visual.head(dense(rectangular)), dim=-1)
            text = model.encode_text(tokens, normalize=True)
            value = loss({"image_features": image, "text_features": text, "logit_scale": model.logit_scale.exp()})
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    benchmark.group = f"training step, {name}"
    run(
        benchmark, call, rounds=10 if w.full else 3,
        what="training step", part="forward, backward, update", workload=name, level="all", implementation=implementation,
    )  # fmt: skip
