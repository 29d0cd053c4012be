"""`hlip embed`, interrupted and gone on with."""

import os
import shutil
import signal
from itertools import chain, repeat
from types import SimpleNamespace

import finished_run
import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file

from hlip.cli import main, vectors
from hlip.train.examples import FolderStudies

place, run = finished_run.place, finished_run.run


@pytest.fixture
def interrupted(run, monkeypatch):
    """A function that embeds ``studies`` into f.npz until ``count`` are done, and then lets something happen."""

    def call(count, happens, *arguments):
        add, seen = vectors.Vectors.add, []

        def counted(self, names, features):
            add(self, names, features)
            seen.extend(names)
            if len(seen) == count:
                happens()

        with monkeypatch.context() as patch:
            patch.setattr(vectors.Vectors, "add", counted)
            return main(["embed", "studies", "--run", run, "--out", "f.npz", *arguments]), seen

    return call


def control_c():
    raise KeyboardInterrupt


def stored(file="f.npz"):
    with np.load(file) as arrays:
        return arrays["studies"].tolist(), arrays["features"]


STUDIES = [f"studies/s{i}" for i in range(4)]


@pytest.mark.parametrize(
    "happens, status, said",
    [(control_c, 130, "stopped by SIGINT"), (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped by SIGTERM")],
)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_stopped_call_is_gone_on_with(run, place, interrupted, capsys, happens, status, said, workers):
    assert main(["embed", "studies", "--run", run, "--out", "whole.npz"]) == 0
    assert interrupted(2, happens, "--workers", workers) == (status, STUDIES[:2])
    assert f"hlip embed: {said}: 2 of 4 studies are kept in {place / 'f.npz.partial'}; --resume" in capsys.readouterr().err
    assert not (place / "f.npz").exists()
    assert interrupted(1, control_c, "--resume") == (130, STUDIES[2:3])
    assert "3 of 4 studies are kept" in capsys.readouterr().err
    assert interrupted(0, None, "--resume") == (0, STUDIES[3:])
    assert "4 of 4 studies, 3 of them before, features (4, 2, 8) -> f.npz" in capsys.readouterr().out
    names, features = stored()
    assert names == STUDIES and np.array_equal(features, stored("whole.npz")[1])
    assert sorted(file.name for file in place.glob("*.npz*")) == ["f.npz", "whole.npz"]


def test_what_an_interrupted_call_has_made_is_not_lost(run, place, interrupted, capsys):
    interrupted(2, control_c)
    assert main(["embed", "studies", "--run", run, "--out", "f.npz"]) == 1
    assert "f.npz.partial is what an interrupted call has made: go on from there (--resume)" in capsys.readouterr().err
    # Other studies are asked for: what is not among them is left out, and the order is theirs.
    shutil.copytree(place / "studies" / "s0", place / "studies" / "a")
    assert main(["embed", "studies/a", "studies/s1", "--run", run, "--out", "f.npz", "--resume"]) == 0
    assert stored()[0] == ["studies/a", "studies/s1"] and "2 studies, 1 of them before" in capsys.readouterr().out


def test_a_finished_file_is_gone_on_with(run, place, interrupted, capsys):
    """As by the next of a chain of jobs: nothing is embedded again, and new studies are added."""
    interrupted(0, None)
    whole = stored()
    assert interrupted(0, None, "--resume") == (0, [])
    assert "4 of 4 studies, 4 of them before" in capsys.readouterr().out and np.array_equal(stored()[1], whole[1])
    shutil.copytree(place / "studies" / "s0", place / "studies" / "a")
    assert interrupted(0, None, "--resume") == (0, ["studies/a"])
    names, features = stored()
    assert (
        names == ["studies/a", *STUDIES] and np.array_equal(features[1:], whole[1]) and np.array_equal(features[0], features[1])
    )
    # A call that ends before it is done loses nothing.
    broken = place / "studies" / "c"
    broken.mkdir()
    (broken / "scan.nii.gz").write_bytes(b"broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderStudies, "__getitem__", lambda *_: control_c())
        assert main(["embed", "studies", "--run", run, "--out", "f.npz", "--workers", "0", "--resume"]) == 130
    assert f"5 of 6 studies are kept in {place / 'f.npz'}; --resume" in capsys.readouterr().err
    shutil.rmtree(broken)
    shutil.copytree(place / "studies" / "s0", place / "studies" / "b")
    assert interrupted(1, control_c, "--resume") == (130, ["studies/b"])
    assert stored()[0] == names and stored("f.npz.partial")[0] == [*names, "studies/b"]
    assert interrupted(0, None, "--resume") == (0, []) and not (place / "f.npz.partial").exists()
    assert main(["embed", "studies/s1", "--run", run, "--out", "f.npz", "--resume"]) == 1
    assert "f.npz is finished, and has 5 studies that are not asked for, e.g. 'studies/a'" in capsys.readouterr().err
    assert main(["embed", "studies", "--run", run, "--out", "f.npz", "--preset", "mri", "--resume"]) == 1
    assert "f.npz was made with other weights" in capsys.readouterr().err and len(stored()[0]) == 6


def test_a_failure_on_the_way_keeps_what_there_is(run, interrupted, capsys, monkeypatch):
    def fails():
        raise ValueError("out of memory")

    assert interrupted(3, fails)[0] == 1
    assert "3 of 4 studies are kept" in (err := capsys.readouterr().err) and "hlip embed: out of memory" in err
    with monkeypatch.context() as patch:
        patch.setattr(vectors.Vectors, "_write", lambda *_, **__: os.open("/nowhere/at/all", 0))
        assert main(["embed", "studies", "--run", run, "--out", "f.npz", "--resume"]) == 1
    assert stored("f.npz.partial")[0] == STUDIES[:3]
    assert interrupted(0, None, "--resume") == (0, STUDIES[3:])


def test_features_are_saved_now_and_then(run, place, interrupted, monkeypatch):
    monkeypatch.setattr(vectors, "SAVE_SECONDS", 0.0)
    saved = []
    interrupted(3, lambda: saved.append(stored("f.npz.partial")[0]))
    assert saved == [STUDIES[:3]] and stored()[0] == STUDIES and not (place / "f.npz.partial").exists()


@pytest.mark.parametrize("what", ["weights", "levels", "preset", "damaged", "another file", "nothing"])
def test_what_cannot_be_gone_on_with_is_told(run, place, interrupted, capsys, caplog, what):
    interrupted(2, control_c)
    more = []
    if what == "weights":
        weights = load_file(place / "run" / "model.safetensors")
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name].view(-1)[3] += 1e-3
        save_file(weights, place / "run" / "model.safetensors")
    elif what == "levels":  # the same weights, attending elsewhere
        config = (place / "run" / "config.yaml").read_text()
        (place / "run" / "config.yaml").write_text(config.replace("- scan\n", "- study\n"))
    elif what == "preset":
        more = ["--preset", "mri"]
    elif what == "damaged":
        (place / "f.npz.partial").write_bytes((place / "f.npz.partial").read_bytes()[:-50])
    elif what == "another file":
        np.savez(open(place / "f.npz.partial", "wb"), other=np.array([object()], dtype=object))
    else:
        (place / "f.npz.partial").unlink()
    capsys.readouterr()
    status = main(["embed", "studies", "--run", run, "--out", "f.npz", "--resume", *more])
    said = {**dict.fromkeys(("weights", "levels", "preset"), "was made with other weights"),
            **dict.fromkeys(("damaged", "another file"), "cannot be read")}  # fmt: skip
    if what == "nothing":
        assert status == 0 and f"no {place / 'f.npz.partial'} to go on from: starting anew" in caplog.text
    else:
        assert status == 1 and said[what] in capsys.readouterr().err and (place / "f.npz.partial").exists()


def test_other_names_do_not_replace_what_is_kept(run, place, interrupted, capsys, caplog, monkeypatch):
    interrupted(2, control_c)
    monkeypatch.chdir(place / "studies")
    assert main(["embed", "s0", "s1", "--run", "../run", "--out", "../f.npz", "--resume"]) == 1
    assert "has other studies than those asked for, 'studies/s0' and not 's0'" in capsys.readouterr().err
    monkeypatch.chdir(place)
    assert stored("f.npz.partial")[0] == STUDIES[:2]
    assert main(["embed", "studies/s1", "studies/s3", "--run", run, "--out", "f.npz", "--resume"]) == 0
    assert "1 of 2 studies in" in caplog.text and "left out, e.g. studies/s0" in caplog.text


def test_a_signal_is_seen_where_studies_cannot_be_read(run, place, interrupted, capsys, monkeypatch):
    for i in (1, 2, 3):
        next((place / "studies" / f"s{i}").iterdir()).write_bytes(b"broken")
    read, seen = FolderStudies.__getitem__, []

    def signalled(self, index):
        seen.append(index)
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, index)

    monkeypatch.setattr(FolderStudies, "__getitem__", signalled)
    assert interrupted(9, None) == (143, STUDIES[:1])
    assert seen == [0, 1] and "stopped by SIGTERM: 1 of 4 studies are kept" in capsys.readouterr().err


def test_a_second_signal_does_not_end_the_saving(run, interrupted, capsys, monkeypatch):
    keep = vectors.Vectors.keep

    def keep_under_fire(self):
        os.kill(os.getpid(), signal.SIGUSR1)  # would end the process
        return keep(self)

    monkeypatch.setattr(vectors.Vectors, "keep", keep_under_fire)
    assert interrupted(2, lambda: os.kill(os.getpid(), signal.SIGTERM))[0] == 143
    assert stored("f.npz.partial")[0] == STUDIES[:2]


def test_a_full_disk_is_not_tried_with_every_study(run, interrupted, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vectors, "time", SimpleNamespace(monotonic=chain([0.0], repeat(1000.0)).__next__))
    monkeypatch.setattr(vectors, "write_atomically", full)
    interrupted(3, control_c)
    assert caplog.text.count("what is there so far could not be saved") == 2  # when it was due, and at the end


def test_control_c_before_anything_is_made_is_said(run, capsys, monkeypatch):
    monkeypatch.setattr(vectors.Vectors, "add", lambda *_: control_c())
    assert main(["embed", "studies", "--run", run, "--out", "f.npz"]) == 130
    assert capsys.readouterr().err.endswith("hlip embed: stopped\n")


def test_a_killed_reader_is_a_line(run, interrupted, capsys, monkeypatch):
    read, caller = FolderStudies.__getitem__, os.getpid()

    def killed(self, index):
        if index == 2 and os.getpid() != caller:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(FolderStudies, "__getitem__", killed)
    assert interrupted(9, None, "--workers", "1")[0] == 1
    assert "hlip embed: a process that reads studies ahead has ended (DataLoader worker" in capsys.readouterr().err
