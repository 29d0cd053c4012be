"""`hlip prepare`: the cache of a training config, filled before training."""

import os
import time

import pytest
import yaml
from data_files import volume

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from hlip.cli import main
from hlip.train import load_config, prepared
from hlip.train.inputs import make_datasets


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Four studies with reports, one of them not readable, one without a report; the same to evaluate on, two with labels."""
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        volume(tmp_path / "studies" / f"s{i}" / "t1.nii.gz", (4 + i, 20, 20), (1.0, 1.0, 4.0))
        if i < 4:
            (tmp_path / "studies" / f"s{i}" / "report.txt").write_text("Mass.")
    (tmp_path / "studies" / "s1" / "t1.nii.gz").write_bytes(b"broken")
    (tmp_path / "labels.csv").write_text("study,mass\ns2,1\ns4,0\n")
    (tmp_path / "p.yaml").write_text("classes: [mass]\n")
    data = {"train": "studies", "valid": "studies", "labels": "labels.csv", "preset": "mri", "cache": "cache"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"run": "run", "data": data, "prompts": "p.yaml"}))
    return tmp_path / "c.yaml"


def prepare(config, *arguments):
    return main(["prepare", "--config", str(config), *arguments])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_and_evaluation_find_what_was_prepared(config, tmp_path, capfd, caplog, monkeypatch, workers):
    assert prepare(config, "--workers", workers) == 1
    assert capfd.readouterr().out.splitlines() == [
        "studies: 4 studies: 3 prepared, 0 were before, 1 could not be -> cache",
        "studies: 2 studies: 1 prepared, 1 were before, 0 could not be -> cache",
    ]
    assert workers != "0" or "s1 left out: " in caplog.text  # workers log in their own processes
    assert len(list((tmp_path / "cache").iterdir())) == 4 and not (tmp_path / "run").exists()
    monkeypatch.setattr(prepared, "prepare_study", lambda path, *_, **__: pytest.fail(f"{path} is prepared again"))
    train, valid, _ = make_datasets(load_config(config))
    assert [len(train[i].scans) for i in (0, 2, 3)] == [1, 1, 1] and valid[4] is not None


def test_the_next_call_does_the_rest(config, tmp_path, capfd):
    assert prepare(config, "--part", "2/2") == 1  # s1 and s3, and of those with labels s4
    assert "4 studies (part 2 of 2)" not in (out := capfd.readouterr().out)
    assert out.startswith("studies: 2 studies (part 2 of 2): 1 prepared, 0 were before, 1 could not be")
    volume(tmp_path / "studies" / "s1" / "t1.nii.gz", (5, 20, 20), (1.0, 1.0, 4.0))
    assert prepare(config) == 0
    assert capfd.readouterr().out.splitlines()[0] == "studies: 4 studies: 3 prepared, 1 were before, 0 could not be -> cache"
    # What is damaged, or of files that have changed since, is prepared again.
    stored = sorted((tmp_path / "cache").iterdir(), key=lambda file: file.stat().st_size)
    stored[0].write_bytes(stored[0].read_bytes()[:-1])
    volume(tmp_path / "studies" / "s3" / "t1.nii.gz", (7, 22, 20), (1.0, 1.0, 4.0))
    assert prepare(config) == 0
    assert "2 prepared, 2 were before" in capfd.readouterr().out


def test_what_was_left_half_written_goes_after_a_day(config, tmp_path):
    prepare(config)
    old, new = (tmp_path / "cache" / f".{name}.safetensors.x.partial" for name in ("a", "b"))
    for partial in (old, new):
        partial.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    prepare(config)
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("cache, words", [
    ("link", "data.cache: prepared scans cannot be stored in link"),
    ("p.yaml/cache", "data.cache: prepared scans cannot be stored in p.yaml/cache"),
    ("locked", "data.cache: no permission to write in locked"),
])  # fmt: skip
def test_a_cache_that_cannot_be_written_is_told_before_studies_are_read(config, tmp_path, capsys, monkeypatch, cache, words):
    (tmp_path / "link").symlink_to("/proc/self/nowhere")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))  # also for root
    monkeypatch.setattr(prepared, "prepare_study", lambda path, *_, **__: pytest.fail(f"{path} is read"))
    assert prepare(config, "--workers", "0", "--set", f"data.cache={cache}") == 1
    assert words in capsys.readouterr().err


def test_a_cache_that_fills_up_is_told(config, caplog, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "write_tensors", full)
    assert prepare(config, "--workers", "0") == 1
    assert "prepared scans cannot be stored" in caplog.text


def test_what_another_process_finishes_writing_is_no_error(tmp_path, monkeypatch):
    cache = prepared.PreparedCache(tmp_path, pytest.fail)
    monkeypatch.setattr(type(tmp_path), "glob", lambda folder, _: [folder / ".a.safetensors.x.partial"])
    cache.remove_stale()


@pytest.mark.parametrize("arguments, words", [
    (["--set", "data.cache="], "data.cache: name the folder"),
    (["--set", "data.train=simulated"], "simulated studies are not read"),
    (["--set", "data.train=nowhere"], "nowhere: no such folder of studies"),
])  # fmt: skip
def test_what_cannot_be_prepared_is_told(config, capsys, arguments, words):
    assert prepare(config, *arguments) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_parts_are_numbered_from_one(config, capsys, part):
    with pytest.raises(SystemExit):
        prepare(config, "--part", part)
    assert "expected K/N with K from 1 to N" in capsys.readouterr().err
