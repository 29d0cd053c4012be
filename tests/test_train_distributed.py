"""Training in two processes, on the CPU with gloo: one step against one process, whole runs, and one process that fails."""

import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from data_files import volume
from processes import LIMIT, together
from tiny import TEXT, scans, tiny_model, tiny_variant

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from hlip.train import folder as run_folder
from hlip.train import load_run, loop, train
from hlip.train.config import config_from
from hlip.train.examples import Example
from hlip.train.run import load_state
from hlip.train.validate import Validation

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")

# ------------------------------------------------------------------ one step

# Per kind of loss: the published variant, and its logit bias. "clip" on a dual model leaves that model's second scale unused.
LOSSES = {
    "dual": ("vit_base_slice_scan_study_dualdinotxt1568", None),
    "clip": ("vit_base_multiscan_h2_token1176", None),
    "clip of a dual model": ("vit_base_slice_scan_study_dualdinotxt1568", None),
    "siglip": ("vit_base_multiscan_h2_dinotxt1176", -3.0),
}
# Studies per process and micro-batch, micro-batches: 8 studies in every row of one process, and of two.
ALONE, SHARED = [(8, 1), (4, 2)], [(4, 1), (2, 2)]


def word_ids(texts):
    """One id per character: reports of one length need no padding, whatever else is in the batch."""
    return torch.tensor([[ord(c) for c in text] for text in texts])


def make_trainer(run, loss, batch_size, accumulate, **changes):
    """A trainer without dropout on 16 ragged studies. Every process starts from other weights: DDP has to share them."""
    name, bias = LOSSES[loss]
    text = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values = {
        "run": str(run),
        "batch_size": batch_size,
        "accumulate": accumulate,
        "lr": 1e-3,
        "epochs": 1,
        "prompt": "",
        "data": {"workers": 0},
    }
    config = config_from({**values, "model": {"loss": loss.split()[0]}, **changes})
    accelerator = loop.make_accelerator(config)
    model = tiny_model(variant=tiny_variant(name, max_scans=0), text=text, init_logit_bias=bias, seed=accelerator.process_index)
    studies = [Example(str(i), scans(2 + i % 7, *[3] * (i % 3), seed=i), [f"study {i:02d}"]) for i in range(16)]
    return loop.Trainer(config, accelerator, model, word_ids, studies, None)


def steps(run, sizes):
    """Per loss and size: the first step's studies, loss and gradients, and all weights after the second."""
    found = {}
    for loss in LOSSES:
        for batch_size, accumulate in sizes:
            trainer = make_trainer(run, loss, batch_size, accumulate)
            named = list(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
            gradients, take = {}, trainer.optimizer.step

            def step(named=named, gradients=gradients, take=take):
                if not gradients:
                    gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})
                take()

            trainer.optimizer.step = step
            names, losses = [], []
            for batches in trainer._micro_batches():
                names.append([name for batch in batches for name in batch.names])
                losses.append(trainer.train_step(batches))
            weights = {name: p.detach().clone() for name, p in named}
            found[loss, batch_size * accumulate, accumulate] = (names, losses, gradients, weights)
    return found


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    return together(steps, folder, ALONE, processes=1)[0], *together(steps, folder, SHARED)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_take_the_step_of_one(stepped, loss, accumulate):
    alone, first, second = stepped
    names, losses, gradients, _ = alone[loss, 8, 1]
    ours, theirs = first[loss, 4, accumulate], second[loss, 4, accumulate]
    assert [sorted(a + b) for a, b in zip(ours[0], theirs[0], strict=True)] == [sorted(n) for n in names]
    assert len(ours[0]) == 2  # a parameter that DDP waits for in vain shows in the second step
    assert ours[1] == theirs[1] and ours[1][0] == pytest.approx(losses[0], rel=1e-5)
    assert ours[2].keys() == theirs[2].keys() == gradients.keys() and "logit_scale" in gradients
    assert ("logit_bias" in gradients) == (loss in ("dual", "siglip"))
    for name, expected in gradients.items():
        assert torch.equal(ours[2][name], theirs[2][name]), name
        # Each way of summing is up to 2.5e-6 of the largest gradient away from float64, on one CPU or the other.
        torch.testing.assert_close(ours[2][name], expected, rtol=1e-3, atol=5e-6 * max(1.0, float(expected.abs().max())))
    assert all(torch.equal(ours[3][name], theirs[3][name]) for name in ours[3])
    # One process over micro-batches is the same step again.
    torch.testing.assert_close(alone[loss, 8, 2][2]["logit_scale"], gradients["logit_scale"], rtol=1e-3, atol=1e-6)


def half_step(run):
    """One step whose loss is NaN on the second process only: weights before and after, the loss, what was said."""
    trainer = make_trainer(run, "dual", 4, 1)
    if trainer.accelerator.process_index == 1:
        real = trainer.loss
        trainer.loss = lambda features: real(features) * float("nan")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with said() as lines:
        loss = trainer.train_step(next(trainer._micro_batches()))
    return before, [p.detach().clone() for p in trainer.model.parameters()], loss, lines


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_both(tmp_path):
    results = together(half_step, tmp_path)
    for before, after, loss, lines in results:
        assert math.isnan(loss) and len(lines) == 1 and "the step is skipped" in lines[0]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert results[0][3] != results[1][3]  # each names its own studies


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for i in range(8):
        for j in range(1 + i % 2):
            volume(root / "studies" / f"s{i}" / f"scan{j}.nii.gz", (4 + i, 24, 20), (1.0, 1.0, 2.0))
        (root / "studies" / f"s{i}" / "report.txt").write_text("A mass is seen. No bleed.\n" if i % 2 else "Normal study.\n")
    (root / "labels.csv").write_text("study,mass\n" + "".join(f"s{i},{i % 2}\n" for i in range(8)))
    (root / "p.yaml").write_text("classes: [mass]\n")
    return root


def run_values(folder, run, **changes):
    """A config of two processes, two steps of four studies an epoch; with all that draws random numbers."""
    data = {"workers": 0, "preset": "mri", "train": str(folder / "studies"), "cache": str(folder / "cache")}
    if changes.pop("validate", False):
        data |= {"valid": str(folder / "studies"), "labels": str(folder / "labels.csv")}
        changes["prompts"] = str(folder / "p.yaml")
    model = {"image_size": [24, 64, 64], "patch_size": [4, 32, 32], "width": 48, "heads": 2, "embed_dim": 16,
             "levels": ["slice", "study"], "patch_dropout": 0.25, "drop_path": 0.1}  # fmt: skip
    return {
        "run": str(run),
        "batch_size": 2,
        "epochs": 2,
        "lr": 1e-3,
        "save_minutes": 0,
        "data": data,
        "model": model,
        **changes,
    }


@contextmanager
def said():
    """What is logged meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("hlip").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("hlip").removeHandler(handler)


def whole_run(values, *, resume=False, validation_takes=0.0, stop_at=None, second_per_look=(0.0, 0.0)):
    """One run as this process sees it: studies and loss of each step, final weights, files written, lines logged, metrics.

    Args:
        validation_takes: seconds the main process is busy before validation. stop_at: a KeyboardInterrupt before this step.
        second_per_look: how far the training loop's clock, of either process, moves whenever it is read; 0 for the real one.
    """
    seen = SimpleNamespace(names=[], losses=[], steps=[], written=[], trainer=None, metrics=None, lines=[])
    take, validate, write, now = loop.Trainer.train_step, Validation.run, run_folder.write_atomically, [0.0]

    def train_step(self, batches):
        seen.trainer = self
        if self.step == stop_at:
            raise KeyboardInterrupt
        seen.steps.append(self.step)
        seen.names.append([name for batch in batches for name in batch.names])
        seen.losses.append(take(self, batches))
        return seen.losses[-1]

    def run(self, *args):
        time.sleep(validation_takes)
        return validate(self, *args)

    def monotonic():
        now[0] += second_per_look[torch.distributed.get_rank()]
        return now[0]

    loop.Trainer.train_step, Validation.run = train_step, run
    run_folder.write_atomically = lambda path, writer: (seen.written.append(path.name), write(path, writer))
    if any(second_per_look):
        loop.time = SimpleNamespace(monotonic=monotonic)
    with said() as seen.lines:
        try:
            seen.metrics = train(config_from(values), resume=resume, progress=False)
        except KeyboardInterrupt:
            assert stop_at is not None
    seen.weights = {name: p.detach().clone() for name, p in seen.trainer.model.named_parameters()}
    seen.step, seen.trainer = seen.trainer.step, None
    return seen


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(folder):
    """A run of two epochs."""
    return together(whole_run, run_values(folder, folder / "whole"))


def test_a_run_sees_every_study_once_an_epoch_and_writes_once(folder, whole):
    first, second = whole
    assert first.step == second.step == 4 and first.losses == second.losses
    for epoch in (0, 1):
        a, b = (sum(seen.names[2 * epoch : 2 * epoch + 2], []) for seen in whole)
        assert len(a) == len(b) == 4 and sorted(a + b) == [f"s{i}" for i in range(8)]
    assert equal(first.weights, second.weights)
    assert first.written == ["config.yaml", *["state.pt"] * 2] and second.written == []
    saved = load_run(folder / "whole").model.state_dict()
    assert all(torch.equal(value, saved[name.removeprefix("module.")]) for name, value in first.weights.items())
    assert first.metrics is None and second.metrics is None


def test_a_stopped_run_goes_on_bit_for_bit(folder, whole):
    values = run_values(folder, folder / "parts")
    together(partial(whole_run, values, stop_at=3))
    state = load_state(folder / "parts" / "state.pt")
    assert state["step"] == 2  # the last whole epoch
    assert len(state["random_states"]) == 2 and not torch.equal(*(s[0] for s in state["random_states"]))
    for part, expected in zip(together(partial(whole_run, values, resume=True)), whole, strict=True):
        assert part.steps == [2, 3] and part.losses == expected.losses[2:] and part.names == expected.names[2:]
        assert equal(part.weights, expected.weights)


def test_another_number_of_processes_goes_on_with_the_same_studies(folder, whole):
    values = run_values(folder, folder / "fewer")
    together(partial(whole_run, values, stop_at=3))
    (alone,) = together(partial(whole_run, {**values, "batch_size": 4}, resume=True), processes=1)
    assert alone.steps == [2, 3]
    for step, names in zip(alone.steps, alone.names, strict=True):
        assert sorted(names) == sorted(whole[0].names[step] + whole[1].names[step])


def test_processes_stop_and_save_by_one_clock(folder):
    """By the second process's own, slower clock, it would neither save inside an epoch nor stop."""
    values = run_values(folder, folder / "late", epochs=4, max_minutes=0.25, save_minutes=0.05)
    first, second = together(partial(whole_run, values, second_per_look=(1.0, 0.001)))
    assert first.steps == second.steps and 1 < first.step == second.step < 8
    assert equal(first.weights, second.weights)
    assert first.written.count("state.pt") > math.ceil(first.step / 2) and second.written == []
    assert load_state(folder / "late" / "state.pt")["step"] == first.step
    for seen in together(partial(whole_run, {**values, "max_minutes": 0.0}, resume=True)):
        assert seen.steps == list(range(first.step, 8))


def test_a_long_validation_keeps_the_others_waiting(folder):
    """Longer than collectives of the model's group wait, once in the middle and once at the end."""
    values = run_values(folder, folder / "valid", validate=True, evaluate_every=1)
    first, second = together(partial(whole_run, values, validation_takes=7.0), timeout=5.0)
    assert first.metrics.num_studies == 8 and second.metrics is None
    assert first.step == second.step == 4 and equal(first.weights, second.weights)


def test_an_unreadable_study_is_replaced_on_its_process(folder, tmp_path):
    shutil.copytree(folder / "studies", tmp_path / "studies")
    (tmp_path / "studies" / "s2" / "scan0.nii.gz").write_bytes(b"broken")
    (tmp_path / "studies" / "s9").mkdir()  # no report: left out, which every process finds and one says
    values = run_values(folder, tmp_path / "run", epochs=1)
    values["data"] |= {"train": str(tmp_path / "studies"), "cache": ""}
    first, second = together(partial(whole_run, values))
    assert first.step == second.step == 2 and equal(first.weights, second.weights)
    names = sorted(sum(first.names + second.names, []))
    assert len(names) == 8 and set(names) == {f"s{i}" for i in range(8)} - {"s2"}
    lines = first.lines + second.lines
    assert sum("s2 left out" in line for line in lines) == 1
    assert sum("1 of 9 studies have no report" in line for line in lines) == 1


def test_every_process_needs_the_same_folder(folder, whole, tmp_path):
    with pytest.raises(Exception, match=r"different states in .*steps \[4, 0\]"):
        together(partial(one_folder_each, run_values(folder, folder / "whole"), str(tmp_path)))


def one_folder_each(values, other):
    """As on machines without a common disk: the second process has a tokenizer, but no state."""
    if torch.distributed.get_rank() == 1:
        shutil.copytree(f"{values['run']}/tokenizer", f"{other}/tokenizer")
        values = {**values, "run": other}
    train(config_from(values), resume=True, progress=False)


# ------------------------------------------------------------------ the command

FAILING = """
import sys, time
from hlip.cli import main
from hlip.train.loop import Trainer

take = Trainer.train_step

def train_step(self, batches):
    if self.step == 1 and self.accelerator.process_index == 1:
        print(f"failing at {time.time()}", flush=True)
        raise ValueError("the disk is gone")
    return take(self, batches)

Trainer.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""


def torchrun(*arguments):
    """The finished ``torchrun`` of two processes, and when it ended."""
    paths = [str(Path(loop.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    return done, time.time()


def test_the_command_trains(folder, whole, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_values(folder, tmp_path / "run", validate=True, evaluate_every=0)))
    done, _ = torchrun("-m", "hlip", "train", "--config", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("macro mean") == 1 and "Warning" not in done.stderr, done.stderr
    # The same seeds, processes and studies as above.
    saved = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(value, saved[name.removeprefix("module.")]) for name, value in whole[0].weights.items())


def test_one_failing_process_ends_the_job(folder, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_values(folder, tmp_path / "run")))
    (tmp_path / "failing.py").write_text(FAILING)
    done, ended = torchrun(tmp_path / "failing.py", "train", "--config", tmp_path / "c.yaml")
    assert done.returncode != 0
    assert "hlip train (process 1 of 2): the disk is gone" in done.stderr
    assert ended - float(re.search(r"failing at ([\d.]+)", done.stdout)[1]) < 30
