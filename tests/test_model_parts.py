"""Names, checkpoints, dropout, batches and the parts of the model that parity does not touch."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXT, scans, tiny_model, tiny_variant

pytest.importorskip("open_clip")

import hlip
from hlip.model import VARIANTS, HLIPEncoder, StudyBatch, Tokenizer, load_checkpoint, load_mae, train_tokenizer, variant
from hlip.model.dropout import draw_kept
from hlip.model.position import resize_scans, rotary_3d, sincos_1d
from hlip_kernels import Layout

ROTARY = "ablate_rope_vit_base_multiscan_h2_dinotxt1568"

# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "spelling, key",
    [
        ("zch0414/clip-vit_base-scan_study-dualdinotxt1568", "vit_base_scan_study_dualdinotxt1568"),
        ("clip-vit_large-slice_scan_study-dualdinotxt1568", "vit_large_slice_scan_study_dualdinotxt1568"),
        ("ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568", "vit_base_scan_study_dualdinotxt1568"),
        ("clip_vit_base_multiscan_h2_token1176", "vit_base_multiscan_h2_token1176"),
        ("hlip-2025_10_08", "ablate_seqposemb_vit_base_multiscan_h2_dinotxt1568"),
        ("ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568", "ablate_rope_vit_base_multiscan_h2_dinotxt1568"),
    ],
)
def test_published_spellings(spelling, key):
    assert variant(spelling) == VARIANTS[key]


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="vit_base_scan_study_dualdinotxt1568"):
        variant("vit_huge")


def test_state_dict_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = hlip.create_model("vit_base_scan_study_dualdinotxt1568").state_dict()
    expected = {
        "visual.trunk.cls_token": (1, 1, 768), "visual.trunk.reg_token": (1, 1, 768),
        "visual.trunk.spatial_posemb": (1, 8, 14, 14, 768), "visual.trunk.patch_embed.proj.weight": (768, 1, 6, 16, 16),
        "visual.trunk.blocks.11.attn.qkv.weight": (2304, 768), "visual.trunk.blocks.0.mlp.fc1.bias": (3072,),
        "visual.trunk.norm.weight": (768,), "visual.head.proj.weight": (768, 1536), "text.proj.weight": (768, 768),
        "text.transformer.embeddings.word_embeddings.weight": (30522, 768),
        "text.transformer.encoder.layer.11.output.dense.weight": (768, 3072), "logit_scale": (), "logit_bias": (),
    }  # fmt: skip
    for name, shape in expected.items():
        assert tuple(state[name].shape) == shape, name
    assert not any("sequential_posemb" in name or "pooler" in name for name in state)
    with torch.device("meta"):
        state = hlip.create_model("vit_base_multiscan_h2_token1176").state_dict()
    assert tuple(state["visual.trunk.sequential_posemb"].shape) == (1, 40, 768) and "logit_bias" not in state


# ------------------------------------------------------------------ checkpoints


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["pt", "module.pt", "bin", "safetensors", "folder"])
def test_checkpoints_of_every_kind(kind, tmp_path):
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    assert not equal(source, target)
    state = source.state_dict()
    if kind == "pt":
        path = tmp_path / "epoch_20.pt"
        torch.save({"epoch": 20, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    elif kind == "module.pt":
        path = tmp_path / "epoch_20.pt"
        torch.save({"epoch": 20, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif kind == "bin":
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path)
    else:
        path = tmp_path / "model.safetensors"
        save_file({k: v.clone() for k, v in state.items()}, path)
        path = tmp_path if kind == "folder" else path
    report = load_checkpoint(target, path, strict=True)
    assert report and "all weights loaded" in str(report) and equal(source, target)


def test_old_names_and_buffers_of_old_libraries(tmp_path):
    name = "vit_base_multiscan_h2_token1176"
    source, target = tiny_model(name, seed=1), tiny_model(name, seed=2)
    state = source.state_dict()
    state["visual.trunk.series_posemb"] = state.pop("visual.trunk.sequential_posemb") + 1
    state["text.transformer.embeddings.position_ids"] = torch.arange(4)[None]
    torch.save(state, tmp_path / "old.pt")
    assert load_checkpoint(target, tmp_path / "old.pt")
    expected = source.visual.trunk.sequential_posemb + 1
    assert torch.equal(target.visual.trunk.sequential_posemb, expected)


def test_missing_and_unexpected_names_are_reported(tmp_path):
    state = tiny_model().state_dict()
    del state["visual.trunk.norm.weight"]
    state["decoder.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "odd.pt")
    report = load_checkpoint(tiny_model(), tmp_path / "odd.pt")
    assert not report and report.missing == ["visual.trunk.norm.weight"] and report.unexpected == ["decoder.weight"]
    assert "visual.trunk.norm.weight" in str(report) and "decoder.weight" in str(report)
    with pytest.raises(ValueError, match="decoder.weight"):
        load_checkpoint(tiny_model(), tmp_path / "odd.pt", strict=True)


def test_another_grid_is_resized_and_another_width_refused(tmp_path):
    state = tiny_model().state_dict()
    torch.save(state, tmp_path / "a.pt")
    bigger = tiny_model(variant=tiny_variant(image_size=(12, 24, 24)))
    report = load_checkpoint(bigger, tmp_path / "a.pt")
    assert report.resized == ["visual.trunk.spatial_posemb"]
    with pytest.raises(ValueError, match="another variant"):
        load_checkpoint(tiny_model(variant=tiny_variant(width=60)), tmp_path / "a.pt")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_hostile_pickles_never_run(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if how == "torch":
        torch.save({"state_dict": tiny_model().state_dict(), "extra": Hostile()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(ValueError, match="weights.pt: cannot be read safely"):
        load_checkpoint(tiny_model(), path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name, content", [("a.safetensors", b"not one"), ("a.pt", b""), ("a.pt", b"PK\x03\x04broken"), ("a.bin", b"\x80\x02.")]
)
def test_broken_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_checkpoint(tiny_model(), tmp_path / name)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tiny_model(), tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="expected one of"):
        load_checkpoint(tiny_model(), tmp_path)
    (tmp_path / "wrong.pt").write_bytes(b"")
    torch.save({"a": torch.zeros(2)}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="belong to this model"):
        load_checkpoint(tiny_model(), tmp_path / "wrong.pt")
    torch.save({"state_dict": {"a": "text"}}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="'a' is a str"):
        load_checkpoint(tiny_model(), tmp_path / "wrong.pt")


def test_mae_inflation_keeps_a_constant_volume_the_same():
    """A volume that repeats one grey image along depth must embed as that image does in the 2-D model."""
    trunk = HLIPEncoder(tiny_variant(image_size=(8, 32, 32), patch_size=(4, 16, 16)).encoder)
    weight, bias = torch.randn(48, 3, 16, 16), torch.randn(48)
    state = {
        "patch_embed.proj.weight": weight, "patch_embed.proj.bias": bias, "pos_embed": torch.randn(1, 1 + 4, 48),
        "cls_token": torch.randn(1, 1, 48), "blocks.0.norm1.weight": torch.randn(48),
    }  # fmt: skip
    missing = load_mae(trunk, state)
    assert "reg_token" in missing and "cls_token" not in missing and "spatial_posemb" not in missing
    image = torch.randn(16, 16)
    flat = torch.nn.functional.conv2d(image.expand(1, 3, 16, 16), weight, bias).flatten()
    volume = image.expand(4, 16, 16).reshape(1, -1)
    torch.testing.assert_close(trunk.patch_embed(volume)[0], flat, rtol=1e-4, atol=1e-4)
    assert torch.equal(trunk.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    depth = sincos_1d(2, 48)
    expected = state["pos_embed"][:, 1:].view(1, 1, 2, 2, 48) + depth[None, :, None, None]
    torch.testing.assert_close(trunk.spatial_posemb, expected)
    with pytest.raises(ValueError, match="do not fit"):
        load_mae(trunk, {**state, "blocks.0.norm1.weight": torch.zeros(7)})


@pytest.mark.parametrize("left_out", ["pos_embed", "cls_token", "patch_embed.proj.weight", "blocks."])
def test_mae_weights_that_lack_something_are_told_of(tmp_path, left_out, caplog):
    trunk = HLIPEncoder(tiny_variant(image_size=(8, 32, 32), patch_size=(4, 16, 16)).encoder)
    state = {
        "patch_embed.proj.weight": torch.randn(48, 3, 16, 16), "pos_embed": torch.randn(1, 5, 48),
        "cls_token": torch.randn(1, 1, 48), "blocks.0.norm1.weight": torch.randn(48),
    }  # fmt: skip
    load_mae(trunk, state)
    assert "of the encoder's, which start fresh, e.g. patch_embed.proj.bias" in caplog.text
    torch.save({name: value for name, value in state.items() if not name.startswith(left_out)}, tmp_path / "mae.pt")
    with pytest.raises(ValueError, match=f"mae.pt: not the weights of a 2-D MAE ViT, which would have {left_out}"):
        load_mae(trunk, tmp_path / "mae.pt")


# ------------------------------------------------------------------ training parts of the encoder


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("level", ["slice", "scan"])
def test_patch_dropout_keeps_a_share_of_every_segment(rate, level):
    layout = Layout.from_grids([[(3, 4, 5), (0, 2, 2), (1, 1, 1)], [], [(2, 7, 7)]])
    kept = draw_kept(layout, level, rate)
    offsets = layout.host_offsets(level)
    for n, k in zip(np.diff(offsets), np.add.reduceat(np.append(kept, 0), offsets[:-1]) * (np.diff(offsets) > 0), strict=True):
        assert k == (max(1, int(n * (1 - rate))) if n else 0)
    torch.manual_seed(3)
    first = draw_kept(layout, level, rate)
    torch.manual_seed(3)
    assert (draw_kept(layout, level, rate) == first).all()


def test_patch_dropout_shortens_training_and_leaves_evaluation():
    encoder = HLIPEncoder(tiny_variant().encoder, patch_dropout=0.5)
    batch = StudyBatch.pack([scans(4, 7), scans(9)])
    x, layout, rope = encoder.embed(batch)
    assert rope is None and layout.num_tokens == sum(2 * d for d in (2, 4, 5))  # half of the 4 patches of each slice
    out = encoder(batch)
    assert out.shape == (2, 2, 96) and out.isfinite().all()
    encoder.eval()
    assert torch.equal(encoder(batch), encoder(batch))
    assert encoder.embed(batch)[1].num_tokens == sum(4 * d for d in (2, 4, 5))
    with pytest.raises(ValueError, match="patch_dropout"):
        HLIPEncoder(tiny_variant().encoder, patch_dropout=1.0)


def test_patch_dropout_takes_rotary_positions_along():
    encoder = HLIPEncoder(tiny_variant(ROTARY).encoder, patch_dropout=0.5)
    batch = StudyBatch.pack([scans(4, 7), scans(9)])
    layout = encoder.layout(batch)
    torch.manual_seed(5)
    kept = draw_kept(layout, "scan", 0.5)
    torch.manual_seed(5)
    _, dropped, rope = encoder.embed(batch)
    encoder.eval()
    _, whole, every = encoder.embed(batch)
    assert every.shape == (whole.num_tokens, 2 * 24) and every.dtype == torch.float32
    assert torch.equal(rope, every[torch.from_numpy(kept)]) and len(rope) == dropped.num_tokens < whole.num_tokens
    assert encoder.embed(StudyBatch.pack([[torch.zeros(0, 16, 16)]]))[2].shape == (0, 48)


@pytest.mark.parametrize("head_dim, channels", [(64, 20), (24, 8), (16, 4)])
def test_rotary_positions_of_a_scan(head_dim, channels):
    sines, cosines = rotary_3d((2, 3, 4), head_dim).chunk(2, 1)
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones(24, head_dim))
    angles = torch.atan2(sines.double(), cosines.double()).view(2, 3, 4, head_dim)
    place = angles[1, 2, 3]  # the first pair of each axis turns by the coordinate itself
    assert [float(place[i * channels]) for i in range(3)] == pytest.approx([1, 2, 3], abs=1e-6)
    assert float(place[channels - 1]) == pytest.approx(10000 ** -(1 - 2 / channels), rel=1e-5)
    assert (angles[..., 3 * channels :] == 0).all() and (angles[..., ::2] == angles[..., 1::2]).all()


@pytest.mark.parametrize("name", ["vit_base_slice_scan_study_dualdinotxt1568", ROTARY])
def test_gradient_checkpointing_changes_nothing(name):
    encoder = HLIPEncoder(tiny_variant(name, depth=6).encoder).train()
    batch = StudyBatch.pack([scans(4, 7), scans(9)])
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    plain = torch.autograd.grad(encoder(batch).square().sum(), trainable)
    encoder.set_grad_checkpointing()
    again = torch.autograd.grad(encoder(batch).square().sum(), trainable)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_drop_path_is_per_segment_and_off_in_evaluation():
    encoder = HLIPEncoder(tiny_variant(drop_path=0.5).encoder)
    assert [round(b.drop_path, 3) for b in encoder.blocks] == [0.0, 0.25, 0.5]
    batch = StudyBatch.pack([scans(4, 7), scans(9)])
    assert not torch.equal(encoder(batch), encoder(batch))
    encoder.eval()
    assert torch.equal(encoder(batch), encoder(batch))
    block, layout = encoder.blocks[2], encoder.layout(batch)
    block.train()
    ones = torch.ones(layout.num_rows, 48)
    factors = block._drop(ones, layout)
    for s in range(layout.num_segments("study")):
        a, b = layout.host_offsets("study")[s : s + 2]
        assert (factors[a:b] == factors[a]).all() and float(factors[a, 0]) in (0.0, 2.0)


def test_scan_positions_are_permuted_in_training_only():
    encoder = HLIPEncoder(tiny_variant("vit_base_multiscan_h2_token1176").encoder)
    batch = StudyBatch.pack([scans(4, 4), scans(4)])
    assert not torch.equal(encoder(batch), encoder(batch))
    encoder.eval()
    assert torch.equal(encoder(batch), encoder(batch))
    many = StudyBatch.pack([scans(*[2] * 45)])
    assert encoder(many).isfinite().all()  # more scans than the table has entries
    assert resize_scans(encoder.sequential_posemb, 45).shape == (45, 48)


def test_empty_studies_and_scans_pass_through():
    encoder = HLIPEncoder(tiny_variant().encoder).eval()
    out = encoder(StudyBatch.pack([scans(4), [], [torch.zeros(0, 16, 16, dtype=torch.uint8)]]))
    alone = encoder(StudyBatch.pack([scans(4)]))
    assert out.isfinite().all() and torch.allclose(out[:1], alone, rtol=1e-4, atol=1e-5)


def test_the_stored_dtype_does_not_matter():
    encoder = HLIPEncoder(tiny_variant().encoder).eval()
    whole = scans(4, 6)
    expected = encoder(StudyBatch.pack([whole]))
    for other in ([s.float() / 255 for s in whole],):
        torch.testing.assert_close(encoder(StudyBatch.pack([other])), expected, rtol=1e-4, atol=1e-5)
    as_int16 = StudyBatch.pack([[s.short() for s in whole]], max_value=255.0)
    torch.testing.assert_close(encoder(as_int16), expected, rtol=1e-4, atol=1e-5)


def test_bad_batches_name_study_and_scan():
    with pytest.raises(ValueError, match="study 1, scan 0"):
        StudyBatch.pack([scans(4), [torch.zeros(3, 3)]])
    with pytest.raises(ValueError, match="study 0, scan 1"):
        StudyBatch.pack([[torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).byte()]])


@pytest.mark.parametrize("options", [{"neighbours": 1}, {"summary": "study"}, {"neighbours": 1, "summary": "scan"}], ids=str)
def test_patterns_go_to_the_blocks_that_can_have_them(options):
    batch = StudyBatch.pack([scans(4, 7), scans(9)])
    results = {}
    for name, made in {"plain": {}, "fast": options, "true": {**options, "backend": "reference"}}.items():
        encoder = tiny_model(text=None, **made).visual.trunk.double()
        out = encoder(batch)
        gradients = torch.autograd.grad(out.square().sum(), [p for p in encoder.parameters() if p.requires_grad])
        results[name] = out, *gradients
    neighbours, summary = options.get("neighbours", 0), options.get("summary")
    assert [(b.level, b.attn.neighbours, b.attn.summary) for b in encoder.blocks] == [
        ("slice", neighbours, summary),
        ("scan", neighbours, None if summary == "scan" else summary),
        ("study", 0, None),
    ]
    for fast, true in zip(results["fast"], results["true"], strict=True):
        torch.testing.assert_close(fast, true, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(results["fast"][0], results["plain"][0], rtol=1e-3, atol=1e-4)
    layout = encoder.embed(batch)[1]  # with its patterns, as compiled blocks need
    assert ("slice", neighbours, summary) in layout._patterns


@pytest.mark.parametrize(
    "options, message",
    [
        ({"summary": "scan"}, "summary='scan' needs attention at a level below 'scan'.*'scan', 'study'"),
        ({"summary": "series"}, "unknown level 'series'"),
        ({"neighbours": -1}, "neighbours must be an int >= 0"),
        ({"attn_drop": 0.1}, "attn_drop: packed rows have no dropout"),
    ],
)
def test_options_that_no_block_can_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HLIPEncoder(tiny_variant("vit_base_scan_study_dualdinotxt1568").encoder, **options)


# ------------------------------------------------------------------ the CLIP model


def test_clip_outputs_and_scales():
    model = tiny_model().eval()
    batch, text = StudyBatch.pack([scans(4, 6), scans(8)]), torch.randint(5, 200, (4, 7))
    out = model(batch, text)
    assert out["image_features"].shape == (2, 2, 24) and out["text_features"].shape == (4, 24)
    torch.testing.assert_close(out["image_features"].norm(dim=-1), torch.ones(2, 2))
    assert math.isclose(out["logit_scale"].item(), 1 / 0.07, rel_tol=1e-5)
    assert math.isclose(out["report_logit_scale"].item(), 1 / 0.07, rel_tol=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        model.logit_bias.fill_(-1.0)
    model.clamp_scales()
    assert float(model.logit_scale) == pytest.approx(math.log(100)) and float(model.logit_bias) == 0.0
    assert model(image=batch)["text_features"] is None


def test_first_generation_gives_one_vector():
    model = tiny_model("vit_base_multiscan_h2_token1176").eval()
    assert model.encode_image(StudyBatch.pack([scans(4)])).shape == (1, 24)
    assert "report_logit_scale" not in model(StudyBatch.pack([scans(4)]))
    with pytest.raises(ValueError, match="without a text tower"):
        tiny_model(text=None).encode_text(torch.zeros(1, 2, dtype=torch.int64))


def test_locked_text_tower_trains_layer_norms_and_projection_only():
    model = tiny_model()
    model.lock_text_tower()
    trained = {name for name, p in model.text.named_parameters() if p.requires_grad}
    assert trained and all("LayerNorm" in name or name == "proj.weight" for name in trained)


def test_text_from_a_local_folder_without_a_network(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**TEXT), add_pooling_layer=False).save_pretrained(tmp_path)
    model = tiny_model(text=tmp_path, text_pretrained=True)
    assert model.encode_text(torch.randint(5, 200, (2, 6))).shape == (2, 24)


def test_tokenizer_learnt_from_reports(tmp_path):
    tokenizer = train_tokenizer(["There is a mass.", "No acute infarct."], tmp_path / "t", context_length=6)
    ids = tokenizer(["There is a mass.", "no ACUTE infarct " * 9])
    assert ids.shape == (2, 6) and ids.dtype == torch.int64
    assert (ids != tokenizer(["?"])[0, 1]).all()  # every word is known
    again = Tokenizer(tmp_path / "t", 6)
    train_tokenizer(["No acute infarct.", "There is a mass."], tmp_path / "same", context_length=6)
    assert (tmp_path / "same" / "tokenizer.json").read_text() == (tmp_path / "t" / "tokenizer.json").read_text()
    assert torch.equal(again(["a mass"]), tokenizer(["A mass"])) and again([]).shape[0] == 0
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([" "], tmp_path / "u")
