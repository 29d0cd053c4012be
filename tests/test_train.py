"""Losses, the exact step over micro-batches, configs, folders of studies, and a whole run that stops and goes on."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from data_files import volume
from tiny import scans, tiny_model

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from hlip.evaluate import Benchmark
from hlip.losses import ContrastiveLoss
from hlip.model import StudyBatch
from hlip.train import best, load_config, train
from hlip.train.best import best_so_far
from hlip.train.config import TrainConfig, config_from
from hlip.train.examples import (
    Batch,
    Collate,
    Example,
    FolderStudies,
    make_text,
    read_labels,
    read_reports,
    split_sentences,
)
from hlip.train.loop import ShardedShuffle, learning_rate, parameter_groups
from hlip.train.published import open_model
from hlip.train.run import load_run, load_state
from hlip.train.step import contrastive_step
from hlip.train.validate import Validation

# ------------------------------------------------------------------ losses


def clip(image, text, scale):
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def features(batch=5, dim=7):
    return F.normalize(torch.randn(batch, 2, dim), dim=-1), F.normalize(torch.randn(2 * batch, dim), dim=-1)


def test_dual_loss_is_half_sentence_half_report():
    image, text = features()
    out = {
        "image_features": image,
        "text_features": text,
        "logit_scale": torch.tensor(9.0),
        "report_logit_scale": torch.tensor(3.0),
    }
    expected = 0.5 * clip(image[:, 0], text[:5], 9.0) + 0.5 * clip(image[:, 1], text[5:], 3.0)
    torch.testing.assert_close(ContrastiveLoss("dual")(out), expected)


def test_clip_and_siglip_loss():
    image, text = features()
    out = {
        "image_features": image,
        "text_features": text[:5],
        "logit_scale": torch.tensor(9.0),
        "logit_bias": torch.tensor(-2.0),
    }
    torch.testing.assert_close(ContrastiveLoss("clip")(out), clip(image[:, 0], text[:5], 9.0))
    logits = 9.0 * image[:, 0] @ text[:5].T - 2.0
    sign = 2 * torch.eye(5) - 1
    torch.testing.assert_close(ContrastiveLoss("siglip")(out), -F.logsigmoid(sign * logits).sum() / 5)


def test_losses_refuse_what_does_not_fit():
    image, text = features()
    out = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(9.0)}
    with pytest.raises(ValueError, match="dual model"):
        ContrastiveLoss("dual")(out)
    with pytest.raises(ValueError, match="5 studies, 10 texts"):
        ContrastiveLoss("clip")(out)
    with pytest.raises(ValueError, match="logit bias"):
        ContrastiveLoss("siglip")({**out, "text_features": text[:5]})
    with pytest.raises(ValueError, match="clip, siglip, dual"):
        ContrastiveLoss("triplet")


# ------------------------------------------------------------------ one step


def micro_batch(start, depths):
    studies = [scans(*d, seed=start + i) for i, d in enumerate(depths)]
    generator = torch.Generator().manual_seed(start)
    tokens = torch.randint(5, 200, (2 * len(studies), 6), generator=generator)
    return Batch(StudyBatch.pack(studies), tokens, [str(start + i) for i in range(len(studies))])


def joined(batches):
    studies = []
    for b in batches:
        at = iter(b.images.voxels.split([d * h * w for s in b.images.shapes for d, h, w in s]))
        studies += [[next(at).view(shape) for shape in study] for study in b.images.shapes]
    halves = [b.tokens.chunk(2) for b in batches]
    tokens = torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return Batch(StudyBatch.pack(studies), tokens, [n for b in batches for n in b.names])


def test_accumulated_gradient_is_that_of_the_whole_batch():
    model = tiny_model().eval()  # no dropout: the whole batch and its parts see the same numbers
    batches = [micro_batch(0, [(4, 6), (8,)]), micro_batch(2, [(2,), (3, 3)]), micro_batch(4, [(5,), (7,)])]
    loss = ContrastiveLoss("dual")
    results = []
    for group in (batches, [joined(batches)]):
        model.zero_grad()
        value = contrastive_step(model, group, loss, lambda t: t.backward(), dual=True)
        results.append((value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (a, grads), (b, expected) = results
    torch.testing.assert_close(a, b)
    assert grads.keys() == expected.keys() and "logit_scale" in grads and "logit_bias" in grads
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_second_pass_draws_the_numbers_of_the_first():
    """With patch dropout on, both passes must drop the same patches, or the gradient belongs to no loss."""
    model = tiny_model(patch_dropout=0.5).train()
    model.text.eval()
    seen = []
    original = model.visual.trunk.embed
    model.visual.trunk.embed = lambda batch: seen.append(original(batch)) or seen[-1]
    batches = [micro_batch(0, [(4, 6), (8,)]), micro_batch(2, [(2,), (3, 3)])]
    contrastive_step(model, batches, ContrastiveLoss("dual"), lambda t: t.backward(), dual=True)
    assert len(seen) == 4
    for first, second in ((0, 2), (1, 3)):
        assert torch.equal(seen[first][0], seen[second][0])


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(lr=1.0, warmup=0.1)
    rates = [learning_rate(i, 100, config) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5, abs=0.01) and rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(1, 100, TrainConfig(lr=1.0, warmup=4)) == pytest.approx(0.5)


def test_what_decays():
    model = tiny_model()
    decay, rest = (group["params"] for group in parameter_groups(model, 0.2))
    names = {id(p): n for n, p in model.named_parameters()}
    assert not any(names[id(p)].endswith("bias") or "logit_scale" in names[id(p)] or p.ndim < 2 for p in decay)
    decaying = {names[id(p)] for p in decay}
    assert {"visual.trunk.blocks.0.attn.qkv.weight", "text.proj.weight"} <= decaying
    # As published: the prefix tokens decay too, and nothing in the model says otherwise to optimisers that ask it.
    assert {"visual.trunk.cls_token", "visual.trunk.reg_token"} <= decaying
    assert not any(hasattr(module, "no_weight_decay") for module in (model, model.visual, model.visual.trunk))
    assert len(decay) + len(rest) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_gets_its_own_share(world):
    samplers = [ShardedShuffle(10, seed=3, rank=r, world_size=world) for r in range(world)]
    dealt = [list(s) for s in samplers]
    assert len({len(d) for d in dealt}) == 1
    flat = [i for d in dealt for i in d]
    assert len(set(flat)) == len(flat) == 10 // world * world
    assert {epoch for epoch, _ in flat} == {0}
    samplers[0].epoch = 1
    assert [index for _, index in samplers[0]] != [index for _, index in dealt[0]]
    samplers[0].epoch, samplers[0].skip = 0, 2
    assert list(samplers[0]) == dealt[0][2:] and len(samplers[0]) == len(dealt[0]) - 2


# ------------------------------------------------------------------ texts, reports, labels


def test_sentences_and_texts():
    report = "FINDINGS: Small bleed, 3.5 mm.  No mass.\nNormal vessels."
    assert split_sentences(report) == ["FINDINGS: Small bleed, 3.5 mm.", "No mass.", "Normal vessels."]
    assert make_text(["a.", "b."], "sentence", "P: ") in ("P: a.", "P: b.")
    assert make_text(["a.", "b."], "report", "P: ") in ("P: a. b.", "P: b. a.")
    assert make_text([], "report", "P: ") == "P:"


def test_collate_leaves_out_what_failed_and_joins_kinds():
    whole = Example("a", scans(4), ["x."])
    ct = Example("b", [torch.full((3, 16, 16), 0.5, dtype=torch.float16)], ["y."], max_value=1.0)
    tokenizer = lambda texts: torch.zeros(len(texts), 3, dtype=torch.int64)  # noqa: E731
    collate = Collate(tokenizer, ("sentence", "report"), "P: ")
    batch = collate([whole, None, ct])
    assert batch.names == ["a", "b"] and batch.tokens.shape == (4, 3)
    assert batch.images.max_value == 1.0 and float(batch.images.voxels[: 4 * 256].max()) <= 1.0
    assert collate([None, Example("c", [], [])]) is None


def test_reports_and_labels(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('study,report\na,"One. Two."\nb,Three.\na,Four.\n', encoding="utf-8-sig")
    assert read_reports(path) == {"a": ["One.", "Two.", "Four."], "b": ["Three."]}
    path.write_text("id,text\n")
    with pytest.raises(ValueError, match="'study' and 'report', found id, text"):
        read_reports(path)
    path.write_text("study,mass,bleed\na,1,0\nb,,1\n")
    labels = read_labels(path, ["bleed", "mass"])
    assert labels["a"] == [0.0, 1.0] and labels["b"][0] == 1.0 and labels["b"][1] != labels["b"][1]
    path.write_text("study,mass\na,yes\n")
    with pytest.raises(ValueError, match="line 2"):
        read_labels(path, ["mass"])
    with pytest.raises(ValueError, match="bleed"):
        read_labels(path, ["bleed"])


# ------------------------------------------------------------------ config


def test_config_reads_overrides_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 3e-4\ndata: {workers: 2}\nmodel: {levels: [scan, study]}\n")
    config = load_config(path, {"data.workers": 0, "model.width": 48})
    assert (config.lr, config.data.workers, config.model.width, config.model.levels) == (3e-4, 0, 48, ("scan", "study"))
    assert config_from(config.to_dict()) == config
    for text, word in (
        ("learning_rate: 3", "learning_rate"), ("lr: fast", "lr"), ("data: 3", "data"), ("batch_size: 1", "batch_size"),
        ("model: {levels: scan}", "levels"), ("model: {image_size: [1, 2]}", "image_size"), ("precision: fp8", "precision"),
        ("a: [", "YAML"), ("- 3", "names and values"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=word):
            load_config(path)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")


# ------------------------------------------------------------------ folders of studies


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "studies"
    for i in range(6):
        (root / f"s{i}").mkdir(parents=True)
        for j in range(1 + i % 2):
            volume(root / f"s{i}" / f"scan{j}.nii.gz", (4 + i, 24, 20), (1.0, 1.0, 2.0))
        (root / f"s{i}" / "report.txt").write_text("A mass is seen. No bleed.\n" if i % 2 else "Normal study.\n")
    return root


def test_a_broken_study_is_named(folder, caplog):
    (folder / "s2" / "scan0.nii.gz").write_bytes(b"broken")
    (folder / "s3" / "report.txt").unlink()
    with caplog.at_level(logging.WARNING):
        studies = FolderStudies(folder, preset="mri")
        assert len(studies) == 5 and "1 of 6 studies have no report" in caplog.text
        assert studies[2] is None and studies[2] is None and studies[0].name == "s0"
        assert caplog.text.count("s2 left out") == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FolderStudies(folder / "nowhere")
    with pytest.raises(ValueError, match="report.txt"):
        FolderStudies(folder / "s0")


def test_the_cache_is_used_and_follows_changes(folder, tmp_path):
    studies = FolderStudies(folder, preset="mri", cache=tmp_path / "cache")
    first = studies[1]
    files = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 1 and all(torch.equal(a, b) for a, b in zip(first.scans, studies[1].scans, strict=True))
    volume(folder / "s1" / "scan0.nii.gz", (9, 24, 20), (1.0, 1.0, 2.0))
    assert len(studies[1].scans[0]) == 9


CONFIG = {
    "batch_size": 2, "epochs": 4, "lr": 1e-3, "evaluate_every": 2,
    "model": {"image_size": [24, 64, 64], "patch_size": [4, 32, 32], "width": 48, "heads": 2, "embed_dim": 16,
              "patch_dropout": 0.25, "levels": ["slice", "study"]},
    "data": {"workers": 0, "preset": "mri"},
}  # fmt: skip


def run_config(folder, run, **changes):
    values = {**CONFIG, **changes, "run": str(run)}
    values["data"] = {**CONFIG["data"], "train": str(folder)}
    return config_from(values)


def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    train(run_config(folder, tmp_path / "whole"), progress=False)
    from hlip.train.loop import Trainer

    original, steps = Trainer.train_step, []

    def interrupted(self, batches):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(folder, tmp_path / "parts"), progress=False)
    monkeypatch.setattr(Trainer, "train_step", original)
    assert load_state(tmp_path / "parts" / "state.pt")["step"] == 6  # the last whole epoch
    train(run_config(folder, tmp_path / "parts"), resume=True, progress=False)
    a, b = (load_state(tmp_path / name / "state.pt") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 12
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    with pytest.raises(ValueError, match="12 steps"):
        train(run_config(folder, tmp_path / "parts", epochs=5), resume=True, progress=False)
    assert not list((tmp_path / "parts").glob(".*.partial"))


def test_a_long_epoch_is_saved_on_the_way(folder, tmp_path, monkeypatch):
    from hlip.train.loop import Trainer

    original, seen = Trainer.train_step, []

    def interrupted(self, batches):
        if len(seen) == 2:  # of three steps in an epoch
            raise KeyboardInterrupt
        seen.append([name for batch in batches for name in batch.names])
        return original(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(folder, tmp_path, epochs=1, save_minutes=1e-9), progress=False)
    assert load_state(tmp_path / "state.pt")["step"] == 2

    def watched(self, batches):
        seen.append([name for batch in batches for name in batch.names])
        return original(self, batches)

    monkeypatch.setattr(Trainer, "train_step", watched)
    train(run_config(folder, tmp_path, epochs=1), resume=True, progress=False)
    assert load_state(tmp_path / "state.pt")["step"] == 3
    assert len(seen) == 3 and len(set(sum(seen, []))) == len(sum(seen, []))  # each study once, none of them again


def test_accumulation_bf16_and_every_loss_run(folder, tmp_path):
    for i, changes in enumerate(
        ({"accumulate": 3, "precision": "bf16"}, {"model": {**CONFIG["model"], "loss": "siglip"}},
         {"model": {**CONFIG["model"], "loss": "clip", "prefix": ["cls"], "pool": "cls", "rotary": True,
                    "grad_checkpointing": True}})
    ):  # fmt: skip
        train(run_config(folder, tmp_path / str(i), epochs=1, **changes), progress=False)
        run = load_run(tmp_path / str(i))
        assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_run_with_validation_gives_metrics_and_loads(folder, tmp_path):
    (tmp_path / "labels.csv").write_text("study,mass\n" + "".join(f"s{i},{i % 2}\n" for i in range(6)))
    (tmp_path / "p.yaml").write_text("classes: [mass]\n")
    values = {**CONFIG, "run": str(tmp_path / "run"), "prompts": str(tmp_path / "p.yaml")}
    values["data"] = {**CONFIG["data"], "train": str(folder), "valid": str(folder), "labels": str(tmp_path / "labels.csv")}
    metrics = train(config_from(values), progress=False)
    assert metrics.num_studies == 6 and metrics.positives == (3,) and 0 <= metrics.macro_auc <= 1
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "best.safetensors", "config.yaml", "model.safetensors", "state.pt", "tensorboard", "tokenizer"
    }  # fmt: skip
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_run(tmp_path / "run")


def test_what_evaluations_can_be_compared():
    def fingerprint(labels=None, prompts=("a mass",), order=1):
        names = ["s1", "s2", "s3"][::order]
        of = SimpleNamespace(names=names)
        benchmark = Benchmark("mine", "multilabel", {"mass": tuple(prompts)})
        return Validation(of, benchmark, {"s1": [1.0], "s2": [0.0], "elsewhere": [1.0], **(labels or {})}).fingerprint

    assert fingerprint() == fingerprint(order=-1) == fingerprint({"elsewhere": [0.0]})
    assert len({fingerprint(), fingerprint({"s2": [1.0]}), fingerprint({"s3": [1.0]}), fingerprint(prompts=["mass"])}) == 4


def test_the_best_weights_stay(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "labels.csv").write_text("study,mass\n" + "".join(f"s{i},{i % 2}\n" for i in range(6)))
    (tmp_path / "p.yaml").write_text("classes: [mass]\n")
    values = {**CONFIG, "run": str(tmp_path / "run"), "prompts": str(tmp_path / "p.yaml"), "epochs": 4, "evaluate_every": 1}
    values["data"] = {**CONFIG["data"], "train": str(folder), "valid": str(folder), "labels": str(tmp_path / "labels.csv")}
    scored, seen, metrics = iter([float("nan"), 0.8, 0.7, 0.8]), [], Validation.run

    def run(self, model, *arguments):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return replace(metrics(self, model, *arguments), auc=(next(scored),))

    monkeypatch.setattr(Validation, "run", run)
    caplog.set_level("INFO", "hlip.train.loop")
    train(config_from(values), progress=False)
    said = [record.getMessage() for record in caplog.records if "macro AUC" in record.getMessage()]
    assert [", the best so far" in line for line in said] == [False, True, False, False]
    for name, expected in (("best.safetensors", seen[1]), ("model.safetensors", seen[3])):
        loaded = open_model(tmp_path / "run" / name).model.state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected), name
    assert best_so_far(tmp_path / "run") == 0.8
    (tmp_path / "run" / "best.safetensors").write_bytes(b"damaged")
    assert best_so_far(tmp_path / "run") == float("-inf")
    with monkeypatch.context() as patch:
        patch.setattr(best, "write_tensors", full_disk)
        assert not best.keep_best(tmp_path / "run", seen[0], 0.5, 1) and "could not be written" in caplog.text
    assert best.keep_best(tmp_path / "run", seen[0], 0.9, 1, "these")
    assert not best.keep_best(tmp_path / "run", seen[1], 0.8, 2, "these")
    assert best.keep_best(tmp_path / "run", seen[1], 0.6, 3, "others") and best_so_far(tmp_path / "run") == 0.6
    assert "kept as best-step-1.safetensors" in caplog.text
    for name, expected in (("best-step-1.safetensors", seen[0]), ("best.safetensors", seen[1])):
        loaded = open_model(tmp_path / "run" / name).model.state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected), name
    assert not best.keep_best(tmp_path / "run", seen[2], float("nan"), 4, "third") and best_so_far(tmp_path / "run") == 0.6
    with pytest.raises(FileNotFoundError, match="absent.safetensors is missing"):
        open_model(tmp_path / "run" / "absent.safetensors")


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_too_few_studies_say_so(folder, tmp_path):
    with pytest.raises(ValueError, match="6 studies on 1 process.* do not fill one batch of 8"):
        train(run_config(folder, tmp_path / "r", batch_size=8), progress=False)


def test_a_loss_that_is_not_finite_skips_the_step(folder, tmp_path, caplog):
    from accelerate import Accelerator

    from hlip.train.inputs import make_datasets, make_tokenizer
    from hlip.train.loop import Trainer
    from hlip.train.run import build_model

    config = run_config(folder, tmp_path / "r")
    dataset, _, _ = make_datasets(config)
    tokenizer = make_tokenizer(config, dataset)
    trainer = Trainer(
        config, Accelerator(cpu=True), build_model(config.model, vocab_size=tokenizer.vocab_size), tokenizer, dataset, None
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.loss = lambda features: features["logit_scale"] * float("nan")
    (batches,) = (next(iter(trainer._micro_batches())),)
    with caplog.at_level(logging.WARNING):
        trainer.train_step(batches)
    assert "step is skipped" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
