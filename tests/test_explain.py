"""Relevance maps: their shape, and what they measure."""

import pytest
import torch
from tiny import scans, tiny_model, tiny_variant

pytest.importorskip("open_clip")

from hlip.explain import _to_maps, occlusion, relevance
from hlip.model import StudyBatch


@pytest.mark.parametrize("method", [relevance, occlusion])
def test_relevance_maps_have_the_shape_of_the_scans(method):
    model = tiny_model(text=None).eval()
    whole = scans(5, 8, 1)
    maps = method(model, whole, torch.randn(24))
    assert [m.shape for m in maps] == [s.shape for s in whole]
    joined = torch.cat([m.flatten() for m in maps])
    assert joined.min() >= 0 and joined.max() == 1.0 and joined.dtype == torch.float32


@pytest.mark.parametrize("method", [relevance, occlusion])
def test_relevance_inside_inference_mode(method):
    model = tiny_model(text=None).eval()
    whole, text = scans(5), torch.randn(24)  # one scan: packing does not copy it
    expected = method(model, whole, text)
    with torch.inference_mode():
        (got,) = method(model, [s.clone() for s in whole], text.clone())
        made_inside = tiny_model(text=None).eval()
    assert torch.equal(got, expected[0]) and got.max() == 1.0
    if method is relevance:
        with pytest.raises(ValueError, match="made inside torch.inference_mode"):
            relevance(made_inside, whole, text)


def rotary_model():
    """One whose maps hang on rotary positions: no others, and logits far apart."""
    variant = tiny_variant("ablate_rope_vit_base_multiscan_h2_dinotxt1568", patch_size=(8, 16, 16), image_size=(16, 16, 16))
    model = tiny_model(text=None, variant=variant).eval()
    with torch.no_grad():
        model.visual.trunk.spatial_posemb.zero_()
        for block in model.visual.trunk.blocks:
            block.attn.qkv.weight.mul_(20)
    return model


def test_relevance_knows_rotary_positions():
    """Of a block in the middle, by hand."""
    model, whole, text = rotary_model(), scans(16, 24), torch.randn(24)
    trunk, kept = model.visual.trunk, []
    hook = trunk.blocks[1].register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0]))
    with torch.enable_grad():
        features = model.encode_image(StudyBatch.pack([whole]))[0, 0]
        (gradient,) = torch.autograd.grad(torch.nn.functional.cosine_similarity(features, text, dim=0), kept[0])
    hook.remove()
    share = (kept[0] * gradient).sum(1)[:5].clamp(min=0).detach()  # two patches and three
    assert share.max() > 0
    maps = relevance(model, whole, text, block=1)
    expected = _to_maps(share, whole, trunk.layout(StudyBatch.pack([whole])), trunk.config.patch_size)
    for got, right in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_occlusion_knows_rotary_positions():
    """A scan without its last patch is a shorter scan."""
    model, (a, b) = rotary_model(), scans(16, 8)

    def fall(*scans_):
        with torch.no_grad():
            features = model.encode_image(StudyBatch.pack([[a, b], list(scans_)]))[:, 0]
        return 1 - float(torch.nn.functional.cosine_similarity(features[0], features[1], dim=0))

    with torch.no_grad():
        text = model.encode_image(StudyBatch.pack([[a, b]]))[0, 0]
    of_a, of_b = occlusion(model, [a, b], text)
    shorter, without = fall(a[:8], b), fall(a, b[:0])
    assert min(shorter, without) > 1e-3
    assert float(of_a[-1].mean() / of_b.mean()) == pytest.approx(shorter / without, rel=1e-3)


def test_occlusion_is_the_fall_of_the_cosine():
    """Checked by leaving a whole patch-deep scan out of the study by hand."""
    variant = tiny_variant("vit_base_scan_study_dualdinotxt1568", 2, patch_size=(8, 16, 16))
    model = tiny_model(text=None, variant=variant).eval()
    whole = scans(8, 8, 8)  # one patch each

    def features(scans_):
        with torch.no_grad():
            return model.encode_image(StudyBatch.pack([scans_]))[0, 0]

    # An empty scan keeps its prefix rows: what is left out is the patch, not the scan.
    empty = torch.zeros(0, 16, 16, dtype=torch.uint8)
    text = features(whole)  # the whole study fits best: everything left out is a fall
    falls = [
        1
        - float(torch.nn.functional.cosine_similarity(features([empty if i == j else s for j, s in enumerate(whole)]), text, 0))
        for i in range(3)
    ]
    maps = occlusion(model, whole, text)
    assert min(falls) > 1e-3
    for fall, m in zip(falls, maps, strict=True):
        assert float(m.max()) == pytest.approx(fall / max(falls), abs=1e-3)
