"""How a run begins, goes on and ends: what is checked first, what is never overwritten, and what survives a failure."""

import logging
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from data_files import volume

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from hlip.cli import main
from hlip.evaluate import Benchmark
from hlip.model import train_tokenizer
from hlip.train import loop, train
from hlip.train.config import config_from
from hlip.train.examples import FolderStudies
from hlip.train.folder import check_folder, save_state, start_folder
from hlip.train.inputs import check_labels, make_datasets, make_tokenizer
from hlip.train.run import load_run, load_state
from hlip.train.validate import Validation

MODEL = {"image_size": [8, 64, 64], "patch_size": [4, 32, 32], "width": 48, "heads": 2, "embed_dim": 16,
         "levels": ["slice", "study"], "patch_dropout": 0.25}  # fmt: skip


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    for i in range(4):
        volume(root / "studies" / f"s{i}" / "scan.nii.gz", (4 + i, 24, 20), (1.0, 1.0, 2.0))
        (root / "studies" / f"s{i}" / "report.txt").write_text("A mass is seen.\n" if i % 2 else "Normal study.\n")
    (root / "labels.csv").write_text("study,mass\n" + "".join(f"s{i},{i % 2}\n" for i in range(4)))
    (root / "others.csv").write_text("study,mass\npatient-1,0\npatient-2,1\n")
    (root / "p.yaml").write_text("classes: [mass]\n")
    return root


def values(root, run, *, labels="", model=None, data=None, **changes):
    """A config of two steps an epoch; validated on the studies themselves if there are ``labels``."""
    data = {"train": str(root / "studies"), "workers": 0, "preset": "mri", "cache": str(root / "cache"), **(data or {})}
    if labels:
        data |= {"valid": str(root / "studies"), "labels": str(root / labels)}
    whole = {"run": str(run), "epochs": 1, "batch_size": 2, "lr": 1e-3, "prompts": str(root / "p.yaml"), **changes}
    return {**whole, "data": data, "model": {**MODEL, **(model or {})}}


def start(root, run, *, resume=False, overwrite=False, **changes):
    return train(config_from(values(root, run, **changes)), resume=resume, overwrite=overwrite, progress=False)


@pytest.fixture(scope="module")
def finished(studies):
    start(studies, studies / "finished")
    return studies / "finished"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ starting


@pytest.mark.parametrize(
    "how, changes, words",
    [
        ("overwrite", {"model": {"levels": ["study", "slice"]}, "data": {"train": "/nonexistent"}}, "nonexistent"),
        ("overwrite", {"model": {"levels": ["study"], "mae": "/nonexistent.pt"}}, "nonexistent"),
        ("overwrite", {"model": {"levels": ["study"]}, "batch_size": 64}, "do not fill one batch"),
        ("overwrite", {"labels": "others.csv"}, "no labels"),
        ("", {"model": {"levels": ["study"]}}, r"already holds a trained run \(model.safetensors, state.pt\)"),
        ("resume", {"model": {"width": 96}}, r"model\.width is 48 there, 96 here"),
        ("resume", {"epochs": 2}, "saved for 2 steps, this config makes 4"),
    ],
)
def test_a_start_that_fails_leaves_the_run_as_it_was(studies, run, how, changes, words):
    before = content(run)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        start(studies, run, resume=how == "resume", overwrite=how == "overwrite", **changes)
    assert content(run) == before


def test_a_run_is_replaced_when_asked(studies, run, tmp_path, monkeypatch):
    """Before the first step of the new one nothing is left of the old that could be taken for it."""
    reports = tmp_path / "reports.csv"
    reports.write_text("study,report\n" + "".join(f"s{i},Cerebellar haemorrhage.\n" for i in range(4)))

    def stopped(self, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "train_step", stopped)
    curves = set((run / "tensorboard").iterdir())
    for name in ("best.safetensors", "best-step-7.safetensors"):
        (run / name).write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt):
        start(studies, run, overwrite=True, data={"reports": str(reports)}, model={"width": 96})
    assert curves and not curves & set((run / "tensorboard").iterdir())
    assert not list(run.glob("*.safetensors")) and not (run / "state.pt").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["width"] == 96
    assert "haemorrhage" in (run / "tokenizer" / "tokenizer.json").read_text()  # learnt from the reports of this run
    assert not list(run.glob(".*"))
    monkeypatch.undo()
    # What is left does not stand in the way of the next start, nor does a tokenizer folder that a kill left empty.
    shutil.rmtree(run / "tokenizer")
    (run / "tokenizer").mkdir()
    start(studies, run)
    assert load_run(run).tokenizer.vocab_size > 5


def test_resuming_what_never_began_says_so(studies, run, tmp_path, caplog):
    config = config_from(values(studies, tmp_path / "mistyped"))
    assert not check_folder(config, resume=True, overwrite=False)
    assert f"no state in {tmp_path / 'mistyped'} to go on from: starting anew" in caplog.text
    assert not (tmp_path / "mistyped").exists()
    (run / "state.pt").unlink()
    with pytest.raises(ValueError, match="weights alone cannot be resumed"):
        check_folder(config_from(values(studies, run)), resume=True, overwrite=False)


def test_a_run_that_names_no_folder(studies, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match="run: .*file is a file, expected a folder"):
            check_folder(config_from(values(studies, tmp_path / name)), resume=False, overwrite=False)


def test_only_another_model_is_refused(studies, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"")

    def goes_on(**model):
        return check_folder(config_from(values(studies, tmp_path, model=model)), resume=True, overwrite=False)

    assert goes_on(width=96)  # nothing to compare with
    start_folder(config_from(values(studies, tmp_path)), None)
    assert goes_on(patch_dropout=0.0, grad_checkpointing=True, backend="sdpa", loss="dual")
    with pytest.raises(ValueError, match=r"model.levels is \['slice', 'study'\] there, .*model.lock_text is False there, True"):
        goes_on(levels=["study", "slice"], lock_text=True)
    start_folder(config_from(values(studies, tmp_path, model={"name": "clip-vit_base-scan_study-dualdinotxt1568"})), None)
    assert goes_on(name="vit_base_scan_study_dualdinotxt1568", width=96)  # the same model, whose name says its shape


def test_a_state_that_does_not_fit(studies, run):
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"state.pt is the state of another model: .* is \(.*\) there, \(.*\) here"):
        start(studies, run, resume=True, model={"width": 96})
    with pytest.raises(ValueError, match=r"state.pt does not fit what this config trains"):
        start(studies, run, resume=True, model={"lock_text": True})
    torch.save({"step": 3}, run / "state.pt")
    with pytest.raises(ValueError, match="not a training state, it lacks model, optimizer, total_steps"):
        load_state(run / "state.pt")


def test_going_on_with_other_studies_is_said(studies, run, caplog):
    start(studies, run, resume=True)
    assert "other studies" not in caplog.text
    shutil.copytree(studies / "studies", run.parent / "others")
    (run.parent / "others" / "s0").rename(run.parent / "others" / "t0")
    start(studies, run, resume=True, data={"train": str(run.parent / "others")})
    assert caplog.text.count(f"{run / 'state.pt'} was saved while training on other studies") == 1


def test_a_damaged_tokenizer_is_named(studies, run):
    shutil.rmtree(run / "tokenizer")
    (run / "tokenizer").mkdir()
    for use in (lambda: start(studies, run, resume=True), lambda: load_run(run)):
        with pytest.raises(ValueError, match=f"^{run / 'tokenizer'}: the run's tokenizer is missing or damaged"):
            use()


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_weights_of_an_earlier_run_come_with_its_tokenizer(studies, finished, tmp_path, named):
    """Other reports would give its text tower's words other numbers, in a vocabulary of a size that may well be the same."""
    reports = tmp_path / "reports.csv"
    reports.write_text("study,report\n" + "".join(f"s{i},Cerebellar haemorrhage.\n" for i in range(4)))
    start(studies, tmp_path / "run", data={"reports": str(reports)}, model={"checkpoint": str(finished / named)})
    before, after = load_run(finished).tokenizer, load_run(tmp_path / "run").tokenizer
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


def test_weights_without_a_tokenizer_are_told_of(studies, finished, tmp_path, caplog):
    shutil.copy(finished / "model.safetensors", tmp_path)
    config = config_from(values(studies, tmp_path / "run", model={"checkpoint": str(tmp_path / "model.safetensors")}))
    make_tokenizer(config, make_datasets(config)[0])
    assert f"no tokenizer lies beside {tmp_path / 'model.safetensors'}; one is learnt from these reports" in caplog.text


# ------------------------------------------------------------------ time


def test_max_minutes_counts_the_time_of_this_start(studies, tmp_path, monkeypatch, caplog):
    """A chain of jobs with one config, each too short for the whole run, comes to its end."""
    now = iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    caplog.set_level(logging.INFO)
    reached = []
    for _ in range(2):
        start(studies, tmp_path, resume=True, epochs=2, max_minutes=0.08, save_minutes=0.0)
        reached.append(load_state(tmp_path / "state.pt")["step"])
    assert reached == [2, 4]  # each as far as the other
    assert "stopped after step 2 of 4 (max_minutes = 0.08); resuming goes on from here" in caplog.text
    caplog.clear()
    start(studies, tmp_path, resume=True, epochs=2)
    assert "has made all its 4 steps: nothing is left to train" in caplog.text and "stopped" not in caplog.text


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 0), (signal.SIGUSR1, 2)])
def test_a_signal_to_stop_finds_the_run_saved(studies, tmp_path, monkeypatch, capsys, number, workers):
    """Sent to all processes of a job, as SLURM does, in the first step of two in an epoch."""
    run, config = tmp_path / "run", tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(values(studies, run, labels="labels.csv", data={"workers": workers})))
    take = loop.Trainer.train_step

    def asked(self, batches):
        if self.step == 0:
            for pid in [child.pid for child in multiprocessing.active_children()] + [os.getpid()]:
                os.kill(pid, number)
        return take(self, batches)

    monkeypatch.setattr(loop.Trainer, "train_step", asked)
    before = signal.getsignal(number)
    assert main(["train", "--config", str(config)]) == 128 + number
    err = capsys.readouterr().err
    assert f"hlip train: stopped by {number.name} after step 1 of 2, and saved; --resume goes on" in err
    assert load_state(run / "state.pt")["step"] == 1 and signal.getsignal(number) is before
    monkeypatch.undo()
    assert main(["train", "--config", str(config), "--resume"]) == 0
    assert load_state(run / "state.pt")["step"] == 2


# ------------------------------------------------------------------ validation


def test_labels_are_compared_with_the_studies_first(studies, caplog):
    found, source = (FolderStudies(studies / "studies", need_reports=False).names, "studies"), "l.csv"
    one, two = Benchmark("b", "multilabel", {"mass": ("mass",)}), Benchmark("b", "multiclass", {"a": ("a",), "b": ("b",)})
    with pytest.raises(ValueError, match=r"l.csv has no labels for any of the 4 studies .* such as 's0', .*; there is 'p1'"):
        check_labels(*found, {"p1": [0.0]}, one, source)
    check_labels(*found, {"s0": [1.0], "s2": [float("nan")]}, one, source)
    assert "2 of 4 studies in" in caplog.text and "no labels in l.csv and are not evaluated on, e.g. s1" in caplog.text
    check_labels(*found, {"s0": [1.0, 0.0], "elsewhere": [1.0, 1.0]}, two, source)
    for values in ([1.0, 1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"need.* one 1 and otherwise 0; 1 of 2 studies have not, e.g. 's3' \(a: "):
            check_labels(*found, {"s0": [0.0, 1.0], "s3": values}, two, source)


def test_labels_of_other_studies_stop_the_start(studies, tmp_path):
    with pytest.raises(ValueError, match="others.csv has no labels for any of the 4 studies"):
        start(studies, tmp_path / "run", labels="others.csv")
    assert not (tmp_path / "run").exists()


def test_a_failing_evaluation_finds_the_run_saved(studies, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Validation, "run", broken)
    with pytest.raises(RuntimeError):
        start(studies, tmp_path, labels="labels.csv")
    assert load_state(tmp_path / "state.pt")["step"] == 2
    monkeypatch.undo()
    assert start(studies, tmp_path, labels="labels.csv", resume=True).num_studies == 4


def test_scores_that_are_not_finite_are_reported_and_training_goes_on(studies, tmp_path, monkeypatch, caplog):
    broken = Validation.run

    def run(self, model, *rest):
        with torch.no_grad():
            return broken(self, model, *rest) if len(caplog.records) else spoilt(self, model, *rest)

    def spoilt(self, model, *rest):
        encode = model.encode_image
        model.encode_image = lambda *args, **options: encode(*args, **options) * float("nan")
        try:
            return broken(self, model, *rest)
        finally:
            del model.encode_image

    monkeypatch.setattr(Validation, "run", run)
    metrics = start(studies, tmp_path, labels="labels.csv", epochs=2)
    assert "step 2: not evaluated: scores of 4 studies are not finite" in caplog.text
    assert metrics.num_studies == 4 and load_state(tmp_path / "state.pt")["step"] == 4


def test_evaluation_changes_no_random_numbers(studies, tmp_path, monkeypatch):
    """So that what was saved before it goes on as if it had been evaluated."""
    evaluate, states = loop.Trainer.evaluate, []

    def watched(self, bar=None):
        states.append(torch.get_rng_state())
        found = evaluate(self, bar)
        states.append(torch.get_rng_state())
        return found

    monkeypatch.setattr(loop.Trainer, "evaluate", watched)
    assert start(studies, tmp_path, labels="labels.csv") is not None
    assert torch.equal(*states)


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("resume", [False, True])
def test_what_killed_processes_left_half_written_goes(studies, tmp_path, resume):
    left = [".state.pt.a1.partial", ".model.safetensors.b2.partial", ".tokenizer.c3.partial/tokenizer.json"]
    for name in (*left, ".notes.d4.partial", "state.pt.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    start_folder(config_from(values(studies, tmp_path)), None if resume else train_tokenizer(["a mass"], tmp_path / "t"))
    assert {path.name for path in tmp_path.glob("*partial")} | {path.name for path in tmp_path.glob(".*partial")} == {
        ".notes.d4.partial", "state.pt.partial"
    }  # fmt: skip


@pytest.mark.parametrize("full", ["state.pt", "model.safetensors"])
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(tmp_path, full):
    def save(step, size):
        # Whichever is larger hits the limit.
        sizes = {"state.pt": 1, "model.safetensors": 1, full: size}
        save_state(tmp_path, {"step": step, "x": torch.ones(sizes["state.pt"])}, {"x": torch.ones(sizes["model.safetensors"])})

    save(1, 1)
    before, limit = content(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"saving failed \(.*File too large.*\)\. What was saved before is as it was"):
            save(1, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert content(tmp_path) == before
