"""Every published variant on dense input against the naive transcription of the published data path."""

from dataclasses import replace

import naive_hlip
import pytest
import torch
from attention_truth import relative

pytest.importorskip("open_clip")

import hlip
from hlip.model import VARIANTS, HLIPEncoder, StudyBatch


def random_weights(encoder):
    """Weights at which every part matters: fresh ones would have prefix tokens of 1e-6 and branches near zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if name.endswith("_token"):
                p.normal_(0, 1, generator=generator)
            elif p.requires_grad and p.ndim > 1:
                p.normal_(0, 1.5 * p[0].numel() ** -0.5, generator=generator)
            elif p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return encoder


def small(config):
    """The variant with its levels, prefix, pooling and positions, at a width and image size for tests."""
    d, h, w = config.patch_size
    width = 48 if config.positions == "3d" else 32
    return replace(config, width=width, heads=2, image_size=(3 * d, 2 * h, 3 * w), drop_path=0.0)


def study(config, batch, scans, depth=None):
    D, H, W = config.image_size
    return torch.randn(batch, scans, 1, depth or D, H, W)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_at_small_width(name):
    config = small(VARIANTS[name].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    scans = 1 if "singlescan" in name or "2744" in name else 3
    x = study(config, 2, scans)
    with torch.no_grad():
        expected = naive_hlip.forward(encoder.state_dict(), config, x)
        assert expected.shape == (2, len(config.prefix), encoder.num_features)
        assert relative(encoder(x), expected) < 1e-5


ROTARY = "ablate_rope_vit_base_multiscan_h2_dinotxt1568"


@pytest.mark.parametrize("name", ["vit_base_multiscan_h3_token1176", "vit_base_slice_scan_study_dualdinotxt1568", ROTARY])
def test_gradients_at_small_width(name):
    config = small(VARIANTS[name].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    x = study(config, 2, 2)
    state = {k: v.detach().clone().requires_grad_(v.dtype.is_floating_point) for k, v in encoder.state_dict().items()}
    trainable = [k for k, p in encoder.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(naive_hlip.forward(state, config, x).square().sum(), [state[k] for k in trainable])
    parameters = dict(encoder.named_parameters())
    got = torch.autograd.grad(encoder(x).square().sum(), [parameters[k] for k in trainable])
    largest = max(float(g.norm()) for g in expected)
    for key, a, b in zip(trainable, expected, got, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(a.norm()) + 1e-7 * largest, key


def test_another_grid_than_the_stored_one():
    config = small(VARIANTS["vit_base_scan_study_dualdinotxt1568"].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    x = study(config, 1, 2, depth=5 * config.patch_size[0])
    with torch.no_grad():
        assert relative(encoder(x), naive_hlip.forward(encoder.state_dict(), config, x)) < 1e-5


def test_trailing_slices_are_ignored_in_dense_input():
    config = small(VARIANTS["vit_base_scan_study_dualdinotxt1568"].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    x = study(config, 1, 2, depth=config.image_size[0] + 2)
    with torch.no_grad():
        assert relative(encoder(x), encoder(x[:, :, :, :-2])) == 0.0


@pytest.mark.parametrize("name", ["vit_base_slice_scan_study_dualdinotxt1568", ROTARY])
def test_a_ragged_batch_equals_its_studies_one_by_one(name):
    """What the published code cannot express: each study of the batch has its own scans, each scan its own size."""
    config = small(VARIANTS[name].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    d, h, w = config.patch_size
    sizes = [[(2 * d, h, 2 * w)], [(d, 2 * h, w), (4 * d, h, w), (2 * d, 3 * h, 2 * w)], [(3 * d, 2 * h, 2 * w)] * 2]
    studies = [[torch.randn(size) for size in scans] for scans in sizes]
    raw = {"max_value": 1.0, "mean": 0.0, "std": 1.0}
    with torch.no_grad():
        together = encoder(StudyBatch.pack(studies, **raw))
        for i, scans in enumerate(studies):
            assert relative(together[i : i + 1], encoder(StudyBatch.pack([scans], **raw))) < 1e-5
        dense = torch.stack(studies[2])[None, :, None]
        assert relative(together[2:], naive_hlip.forward(encoder.state_dict(), config, dense)) < 1e-5


def test_rotary_positions_matter():
    config = small(VARIANTS[ROTARY].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    without = HLIPEncoder(replace(config, rotary=False)).eval()
    without.load_state_dict(encoder.state_dict())  # they are not parameters
    x = study(config, 1, 2)
    with torch.no_grad():
        assert relative(encoder(x), without(x)) > 1e-2


def test_scan_order_does_not_matter_without_scan_positions():
    config = small(VARIANTS["vit_base_scan_study_dualdinotxt1568"].encoder)
    encoder = random_weights(HLIPEncoder(config)).eval()
    x = study(config, 2, 3)
    with torch.no_grad():
        assert relative(encoder(x), encoder(x[:, [2, 0, 1]])) < 1e-5
    ordered = random_weights(HLIPEncoder(small(VARIANTS["vit_base_multiscan_h2_token1176"].encoder))).eval()
    x = study(ordered.config, 2, 3)
    with torch.no_grad():
        assert relative(ordered(x), ordered(x[:, [2, 0, 1]])) > 1e-3


def test_one_full_base_model():
    model = hlip.create_model("vit_base_slice_scan_study_dualdinotxt1568", text=None).eval()
    encoder = random_weights(model.visual.trunk)
    x = torch.randn(1, 1, 1, 48, 224, 224)
    with torch.no_grad():
        assert relative(encoder(x), naive_hlip.forward(encoder.state_dict(), encoder.config, x)) < 1e-5


PARAMETERS = {  # total and trainable parameters of the published encoders, from the facts of the published system
    "vit_base_multiscan_h2_token1176": (87.56e6, 86.63e6),
    "vit_base_singlescan_h2_token2744": (90.70e6, 88.60e6),
    "vit_base_scan_study_dualdinotxt1568": (87.44e6, 86.24e6),
    "vit_large_scan_study_dualdinotxt1568": (305.49e6, 303.89e6),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        encoder = HLIPEncoder(VARIANTS[name].encoder)
    total = sum(p.numel() for p in encoder.parameters())
    trainable = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert (round(total / 1e4), round(trainable / 1e4)) == tuple(round(n / 1e4) for n in PARAMETERS[name])
