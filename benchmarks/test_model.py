"""The layer, the encoder and a training step: ragged packed rows against the published way of doing the same."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import workloads
from benchmarks.dense import DenseEncoder, published_batch
from benchmarks.measure import device, dtype, full_size, relative_error, run, tolerance
from benchmarks.order import Order
from benchmarks.peers import dense_flops, has_flash, padded_flops, too_much, torch_varlen
from hlip.losses import ContrastiveLoss
from hlip.model import HLIPEncoder, StudyBatch, create_model
from hlip.model.variants import BIOMEDBERT, Encoder, Variant
from hlip_kernels import HierarchicalAttention

MODEL_WORKLOADS = ("chest_ct", "brain_mri_h3", "uncurated_mri", "long_tail")
# Training keeps some 35 bytes of activations per row, layer and channel: for this many rows some 50 GB. With more, every block
# is computed again in the backward pass.
MOST_ROWS_KEPT = 150_000
EMBED_DIM = 128
LAYERS = ["hlip", "padded SDPA", *(["torch varlen"] if has_flash(device(), dtype()) else [])]


class DenseLayer(nn.Module):
    """timm-style attention over segments padded to the longest, gathered and scattered around it."""

    def __init__(self, layer: HierarchicalAttention, w: workloads.Workload, level: str):
        super().__init__()
        self.layer = layer
        self.order = Order.of(w, level, device(), "padding")
        self.mask = self.order.mask(dtype())

    def forward(self, x):
        qkv = self.layer.qkv(self.order.gather(x))
        qkv = qkv.unflatten(0, (-1, self.order.longest)).unflatten(-1, (3, self.layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=self.mask).transpose(1, 2).flatten(2)
        return self.order.scatter(self.layer.proj(out).flatten(0, 1))


class VarlenLayer(nn.Module):
    """The same over segments one after the other, with torch's varlen attention."""

    def __init__(self, layer: HierarchicalAttention, w: workloads.Workload, level: str):
        super().__init__()
        self.layer = layer
        self.order = Order.of(w, level, device())
        self.offsets = self.order.offsets()

    def forward(self, x):
        qkv = self.layer.qkv(self.order.gather(x)).unflatten(-1, (3, self.layer.num_heads, -1))
        out = torch_varlen(*qkv.unbind(1), self.offsets, self.order.longest)
        return self.order.scatter(self.layer.proj(out.flatten(1)))


@pytest.mark.parametrize("implementation", LAYERS)
@pytest.mark.parametrize("name, level", [(n, lv) for n in workloads.NAMES for lv in workloads.make(n, full=full_size()).levels])
def test_layer(benchmark, workload, name, level, implementation):
    """One attention layer with its projections, forward and backward."""
    w = workload(name)
    reason = too_much(padded_flops(w, level), w.attention_flops(level), device())
    if implementation == "padded SDPA" and reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    layer = HierarchicalAttention(w.dim, w.heads, qkv_bias=True, device=device(), dtype=dtype())
    layout = w.layout.to(device())
    x = torch.randn(w.layout.num_rows, w.dim, device=device(), dtype=dtype(), requires_grad=True)
    live = w.layout.prefix_rows(level).stop

    def ours(x):
        return layer(x, layout, level)

    made = {
        "hlip": lambda: ours,
        "padded SDPA": lambda: DenseLayer(layer, w, level),
        "torch varlen": lambda: VarlenLayer(layer, w, level),
    }
    forward = made[implementation]()
    # Ours against padding, the others against ours.
    truth = ours if implementation != "hlip" else None if reason else made["padded SDPA"]()
    if truth is not None:
        with torch.no_grad():
            assert relative_error(forward(x)[:live], truth(x)[:live]) < 4 * tolerance()

    def call():
        out = forward(x)
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


def _no_published(w: workloads.Workload, levels: tuple[str, ...]) -> str:
    """Why the published path through an encoder of these levels is left out; empty if it is measured.

    Every scan gets the depth of the deepest one, every study the scans of the longest.
    """
    scans = [grid for study in w.layout.grids for grid in study]
    studies, most = len(w.layout.grids), max(map(len, w.layout.grids))
    depth, area = max(d for d, _, _ in scans), max(h * w_ for _, h, w_ in scans)
    units = {"slice": studies * most * depth, "scan": studies * most, "study": studies}
    rows = studies * most * depth * area
    reasons = []
    for level in sorted(set(levels)):
        flops = dense_flops(units[level], rows // units[level] + w.layout.num_prefix, w.dim)
        reason = too_much(flops, w.attention_flops(level), device())
        reasons += [f"{level}: {reason}"] if reason else []
    return "; ".join(reasons)


@pytest.mark.parametrize("implementation", ["hlip", "published path"])
@pytest.mark.parametrize("name", MODEL_WORKLOADS)
def test_encoder(benchmark, workload, name, implementation):
    """The image encoder on uint8 voxels, forward, without gradients."""
    w = workload(name)
    encoder, studies = _encoder(w)
    reason = _no_published(w, encoder.levels)
    if implementation == "published path" and reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    trunk = HLIPEncoder(encoder).to(device()).eval()
    batch = StudyBatch.pack(studies).to(device())
    same = len({tuple(s.shape) for study in studies for s in study}) == 1 and len({len(s) for s in studies}) == 1
    rectangular = published_batch(studies, device()) if same or implementation == "published path" else None
    dense = DenseEncoder(trunk)
    call = (lambda: trunk(batch)) if implementation == "hlip" else (lambda: dense(rectangular))
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
        if same:
            assert relative_error(trunk(batch), dense(rectangular)) < 10 * tolerance()
        benchmark.group = f"encoder, {name}"
        run(
            benchmark, call, rounds=_rounds(w),
            what="encoder", part="forward", workload=name, level="all", implementation=implementation,
        )  # fmt: skip


def _rounds(w: workloads.Workload) -> int:
    """Calls take from tenths of a second to seconds."""
    return 10 if w.full and w.layout.num_rows <= MOST_ROWS_KEPT else 3


def _text_side(studies: int):
    """Options of the model, its text features, and the loss.

    With open_clip a small BERT on short texts and its loss. A machine without it measures the image side alone: against fixed
    text features, with the same loss written out.
    """
    if all(importlib.util.find_spec(module) for module in ("open_clip", "transformers")):
        loss = ContrastiveLoss("clip")
        tokens = torch.randint(5, 512, (studies, 32), device=device())
        bert = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
        return (
            bert | {"vocab_size": 512},
            lambda model: model.encode_text(tokens, normalize=True),
            loss,
            "forward, backward, update",
        )
    fixed = F.normalize(torch.randn(studies, EMBED_DIM, device=device()), dim=-1)

    def clip(features):
        logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
        own = torch.arange(studies, device=device())
        return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))

    return None, lambda model: fixed, clip, "forward, backward, update, image side"


@pytest.mark.parametrize("implementation", ["hlip", "published path"])
@pytest.mark.parametrize("name", MODEL_WORKLOADS)
def test_training_step(benchmark, workload, name, implementation):
    """Forward, CLIP loss, backward and AdamW, on studies and short texts."""
    w = workload(name)
    encoder, studies = _encoder(w)
    reason = _no_published(w, encoder.levels)
    if implementation == "published path" and reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    text, text_features, loss, part = _text_side(len(studies))
    config = Variant(encoder, EMBED_DIM, token_axis=True, dual=False, text_model=BIOMEDBERT)
    model = create_model(config, text=text).to(device()).train()
    if w.layout.num_rows > MOST_ROWS_KEPT:
        model.set_grad_checkpointing()
        part += ", checkpointed"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if implementation == "hlip":
        batch, image_side = StudyBatch.pack(studies).to(device()), model.visual
    else:
        dense = DenseEncoder(model.visual.trunk)
        batch, image_side = published_batch(studies, device()), lambda x: model.visual.head(dense(x))

    def call():
        with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
            image = F.normalize(image_side(batch), dim=-1)[:, 0]
            features = {"image_features": image, "text_features": text_features(model)}
            value = loss(features | {"logit_scale": model.logit_scale.exp()})
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    benchmark.group = f"training step, {name}"
    run(
        benchmark, call, rounds=_rounds(w),
        what="training step", part=part, workload=name, level="all", implementation=implementation,
    )  # fmt: skip
