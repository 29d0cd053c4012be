"""`hlip evaluate` and `hlip embed` on folders of studies: with a run, and with published weights."""

import csv
import os
import shutil
from pathlib import Path

import finished_run
import numpy as np
import pytest
import torch
import yaml
from tiny import TEXT, tiny_variant

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file

from hlip.cli import embed as embedding
from hlip.cli import main
from hlip.evaluate import classification_metrics
from hlip.model import VARIANTS, Tokenizer, create_model, train_tokenizer
from hlip.train import published, validate

place, run = finished_run.place, finished_run.run
NAME = "vit_base_scan_study_dualdinotxt1568"


def features(*arguments, path="studies/s0"):
    assert main(["embed", path, "--out", "f.npz", *arguments]) == 0
    with np.load("f.npz") as stored:
        return stored["features"]


def given(*arguments):
    return ["--studies", "studies", "--labels", "labels.csv", "--prompts", "p.yaml", *arguments]


# ------------------------------------------------------------------ how studies are prepared


def test_studies_are_prepared_as_the_run_was_trained(run, capsys, caplog):
    ours = features("--run", run)
    assert not caplog.text
    same = features("--run", run, "--preset", "mri-published-48")
    assert not caplog.text and np.array_equal(ours, same)
    other = features("--run", run, "--preset", "mri")
    assert "--preset mri: the model was trained on scans prepared otherwise (mri-published-48)" in caplog.text
    assert not np.array_equal(ours, other)
    caplog.clear()
    tables = []
    for arguments in ([], given()):
        capsys.readouterr()
        assert main(["evaluate", run, *arguments]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and tables[0] and not caplog.text
    assert main(["evaluate", run, *given("--preset", "mir")]) == 1
    assert "no preset named 'mir'" in capsys.readouterr().err


def test_studies_are_read_within_the_limits_of_the_run(run, place, caplog):
    values = yaml.safe_load((place / "run" / "config.yaml").read_text())
    values["data"]["min_slices"] = 6  # the studies have 5
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    for arguments in (["embed", "studies", "--run", run], ["evaluate", run], ["evaluate", run, *given()]):
        assert main(arguments) == 1
    assert "s0 left out" in caplog.text


def test_other_prompts_for_the_runs_own_studies(run, place, capsys):
    (place / "other.yaml").write_text("classes: {mass: [tumour]}\n")
    assert main(["evaluate", run, "--prompts", "other.yaml"]) == 0
    out = capsys.readouterr().out
    assert "mass" in out and "bleed" not in out


# ------------------------------------------------------------------ what is scored


def test_studies_and_labels_that_do_not_meet_are_said(run, place, capsys, caplog):
    (place / "labels.csv").write_text("study,mass,bleed\ns1,1,0\ns2,0,1\nz1,0,0\nz2,1,0\nz3,1,1\n")
    assert main(["evaluate", run, *given()]) == 0
    assert "3 of 5 studies that labels.csv has labels for are not in studies, e.g. z1" in caplog.text
    assert "2 of 4 studies in studies have no labels in labels.csv and are not evaluated on, e.g. s0" in caplog.text
    assert "/2 " in capsys.readouterr().out
    (place / "labels.csv").write_text("study,mass,bleed\nz1,0,0\n")
    assert main(["evaluate", run, *given()]) == 1
    err = capsys.readouterr().err
    assert "no labels for any of the 4 studies in studies" in err and "'s0'" in err and "'z1'" in err


def test_studies_that_cannot_be_read_are_counted_and_told_by_the_exit_status(run, place, capsys, caplog):
    for name in ("s1", "s3"):
        shutil.rmtree(place / "studies" / name)
        (place / "studies" / name).mkdir()
        (place / "studies" / name / "t1.nii.gz").write_bytes(b"broken")
    for arguments in ([], given()):
        caplog.clear()
        assert main(["evaluate", run, *arguments]) == 1
        assert "/2 " in capsys.readouterr().out
        assert "2 of the 4 studies with labels cannot be read" in caplog.text and caplog.text.count("left out") == 2
    # What has no label is not read.
    (place / "labels.csv").write_text("study,mass,bleed\ns0,1,0\ns2,0,1\n")
    caplog.clear()
    assert main(["evaluate", run, *given()]) == 0
    assert "left out" not in caplog.text
    (place / "labels.csv").write_text("study,mass,bleed\ns1,1,0\n")
    assert main(["evaluate", run, *given()]) == 1
    assert "none of the 1 studies with labels can be read" in capsys.readouterr().err


def test_competing_classes_are_checked_before_any_study_is_read(run, place, capsys):
    (place / "p.yaml").write_text("kind: multiclass\nclasses: [mass, bleed]\n")
    assert main(["evaluate", run, *given()]) == 1
    assert "2 of 4 studies have not, e.g. 's0' (mass: 0, bleed: 0)" in capsys.readouterr().err


def test_prompts_are_read_before_studies(run, place, capsys):
    (place / "p.yaml").write_text("classes: []\n")
    assert main(["embed", "studies", "--run", run, "--out", "f.npz", "--prompts", "p.yaml"]) == 1
    assert "p.yaml" in capsys.readouterr().err and not (place / "f.npz").exists()


@pytest.mark.parametrize(
    "out, words", [("studies", "is a folder"), ("p.yaml/f.npz", "p.yaml is a file"), ("locked/f.npz", "no permission")]
)
def test_a_file_that_cannot_be_written_is_told_before_studies_are_read(run, place, capsys, monkeypatch, out, words):
    (place / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))  # also for root
    monkeypatch.setattr(embedding, "embedded", None)
    assert main(["embed", "studies", "--run", run, "--out", out]) == 1
    assert words in capsys.readouterr().err


def test_vectors_are_written_whole_to_the_file_that_is_named(run, place, capsys, monkeypatch):
    assert main(["embed", "studies/s0", "--run", run, "--out", "new/features.npy"]) == 0
    assert "-> new/features.npy" in capsys.readouterr().out
    assert [file.name for file in (place / "new").iterdir()] == ["features.npy"]
    with np.load(place / "new" / "features.npy") as stored:
        before = stored["features"]

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert main(["embed", "studies/s1", "--run", run, "--out", "new/features.npy"]) == 1
    assert "No space left" in capsys.readouterr().err
    with np.load(place / "new" / "features.npy") as stored:
        assert np.array_equal(stored["features"], before)
    assert [file.name for file in (place / "new").iterdir()] == ["features.npy"]


def test_labels_name_studies_deeper_in_the_folder(run, place, capsys, caplog):
    for i in range(4):
        (place / "studies" / f"p{i // 2}").mkdir(exist_ok=True)
        (place / "studies" / f"s{i}").rename(place / "studies" / f"p{i // 2}" / f"s{i}")
    (place / "labels.csv").write_text("study,mass,bleed\n" + "".join(f"p{i // 2}/s{i},{i % 2},{i // 2}\n" for i in range(4)))
    for arguments in (given(), []):  # those are the run's own
        assert main(["evaluate", run, *arguments]) == 0
        assert "/4 " in capsys.readouterr().out and not caplog.text


# ------------------------------------------------------------------ scores


def test_scores_of_every_study_are_written(run, place, capsys):
    (place / "labels.csv").write_text("study,mass,bleed\ns0,0,\ns1,1,0\ns2,0,1\ns3,1,1\n")
    assert main(["evaluate", run, *given("--scores", "new/scores.csv")]) == 0
    out = capsys.readouterr().out
    assert "scores of 4 studies -> new/scores.csv" in out
    rows = list(csv.DictReader(open(place / "new" / "scores.csv", newline="")))
    assert list(rows[0]) == ["study", "mass", "bleed", "label: mass", "label: bleed"]
    assert [row["study"] for row in rows] == ["s0", "s1", "s2", "s3"]
    assert [row["label: bleed"] for row in rows] == ["", "0", "1", "1"]
    scores = np.array([[float(row["mass"]), float(row["bleed"])] for row in rows])
    labels = np.array([[float(row[f"label: {c}"] or "nan") for c in ("mass", "bleed")] for row in rows])
    assert classification_metrics(scores, labels, ["mass", "bleed"]).table() in out
    assert main(["evaluate", run, *given("--scores", "studies")]) == 1
    assert "--scores: " in (err := capsys.readouterr().err) and "is a folder" in err


def test_a_full_disk_does_not_take_the_table_away(run, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validate, "write_atomically", full)
    assert main(["evaluate", run, *given("--scores", "scores.csv")]) == 1
    said = capsys.readouterr()
    assert "macro mean" in said.out and "hlip evaluate: No space left" in said.err and "->" not in said.out


def test_features_of_before_are_scored_as_studies_are(run, place, capsys, caplog):
    assert main(["evaluate", run, *given("--scores", "read.csv")]) == 0
    table = capsys.readouterr().out.split("scores of")[0]
    assert main(["embed", "studies", "--run", run, "--out", "f.npz"]) == 0
    shutil.rmtree(place / "studies")
    stored = ["--features", "f.npz", *given()[2:]]
    capsys.readouterr()
    assert main(["evaluate", run, *stored, "--scores", "stored.csv"]) == 0
    assert capsys.readouterr().out.split("scores of")[0] == table and not caplog.text
    assert (place / "stored.csv").read_text() == (place / "read.csv").read_text()
    # A whole name, the end of one, and one that is not there.
    (place / "labels.csv").write_text("study,mass,bleed\nstudies/s1,1,0\ns2,0,1\nz,0,0\n")
    assert main(["evaluate", run, *stored]) == 0
    assert "/2 " in capsys.readouterr().out and "1 of 3 studies that labels.csv has labels for are not in f.npz" in caplog.text
    assert "2 of 4 studies in f.npz have no labels in labels.csv" in caplog.text


def test_features_that_cannot_be_scored_are_told(run, place, capsys):
    for i in range(4):
        shutil.copytree(place / "studies" / f"s{i}", place / "more" / f"s{i}")
    assert main(["embed", "studies", "more", "--run", run, "--out", "f.npz"]) == 0

    def refused(*arguments):
        capsys.readouterr()
        assert main(["evaluate", run, "--features", *arguments]) == 1
        return capsys.readouterr().err

    table = given()[2:]
    assert "'s0' could be 'studies/s0' or 'more/s0' of f.npz; name more of the path" in refused("f.npz", *table)
    (place / "labels.csv").write_text("study,mass,bleed\nmore/s1,1,0\n" + "s1,1,0\n")
    assert "could be" in refused("f.npz", *table)
    (place / "labels.csv").write_text("study,mass,bleed\nz,1,0\n")
    assert "no labels for any of the 8 studies in f.npz" in refused("f.npz", *table)
    assert "leave out --studies" in refused("f.npz", *given())
    assert "--features needs --labels" in refused("f.npz", "--prompts", "p.yaml")
    assert "absent.npz" in refused("absent.npz", *table)
    assert "cannot be read as features of `hlip embed`" in refused("labels.csv", *table)
    for names, vectors, said in (
        (["a"], np.ones((1, 8)), "1 studies, but features (1, 8) of float64"),
        (["a", "b"], np.ones((1, 8), np.float32), "2 studies, but features (1, 8) of float32"),
        ([1], np.ones((1, 8), np.float32), "not of `hlip embed`"),
        ("a", np.float32(1), "1 studies, but features () of float32"),
        ([object()], np.ones((1, 8), np.float32), "cannot be read as features"),
    ):
        np.savez(place / "other.npz", studies=np.array(names), features=vectors, model=np.array("m"))
        assert said in refused("other.npz", *table)
    np.save(place / "other.npy", np.ones((1, 8)))
    assert "cannot be read as features" in refused("other.npy", *table)
    weights = load_file(place / "run" / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, place / "run" / "model.safetensors")
    assert "f.npz was made with other weights than these" in refused("f.npz", *table)


def test_a_study_is_named_once(run, place, capsys):
    assert main(["embed", "studies", "--run", run, "--out", "f.npz"]) == 0
    (place / "labels.csv").write_text("study,mass,bleed\nstudies/s1,1,0\ns1,1,0\n")
    assert main(["evaluate", run, "--features", "f.npz", *given()[2:]]) == 1
    assert "'studies/s1' and 's1' are the same study of f.npz; keep one" in capsys.readouterr().err


def test_readers_ahead_change_nothing(run, place, capsys):
    tables = []
    for workers in ("0", "2"):
        assert main(["evaluate", run, *given("--workers", workers, "--scores", f"{workers}.csv")]) == 0
        tables.append((place / f"{workers}.csv").read_text())
    assert tables[0] == tables[1]
    with pytest.raises(SystemExit):
        main(["evaluate", run, "--workers", "-1"])
    assert "expected a number, 0 or more, got '-1'" in capsys.readouterr().err


def test_links_are_followed_when_asked(run, place, capsys):

    (place / "store").mkdir()
    for i in range(4):
        file = next((place / "studies" / f"s{i}").iterdir())
        file.rename(place / "store" / file.name)
        file.symlink_to(place / "store" / file.name)
    assert main(["embed", "studies", "--run", run, "--out", "f.npz"]) == 1
    assert features("--run", run, "--follow-links", path="studies").shape[0] == 4
    assert main(["evaluate", run, *given("--follow-links")]) == 0


# ------------------------------------------------------------------ published weights


@pytest.fixture
def snapshot(place, monkeypatch):
    """As the hub's local cache holds one: weights by name, a tokenizer, and no run."""
    monkeypatch.setitem(VARIANTS, NAME, tiny_variant(NAME, depth=1, image_size=(48, 224, 224), patch_size=(8, 56, 56)))
    monkeypatch.setattr(published, "create_model", lambda config: create_model(config, text=TEXT))
    folder = place / "models--zch0414--clip-vit_base-scan_study-dualdinotxt1568" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(create_model(NAME, text=TEXT).state_dict(), folder / "model.safetensors")
    train_tokenizer(["This study shows: mass bleed."], folder)
    return folder


def test_published_weights_are_used_where_a_run_is(snapshot, place, capsys, caplog):
    ours = features("--run", str(snapshot), "--prompts", "p.yaml")
    assert ours.shape == (1, 2, 24) and "mass" in capsys.readouterr().out and not caplog.text
    assert main(["evaluate", str(snapshot / "model.safetensors"), *given()]) == 0
    assert "macro mean" in capsys.readouterr().out and not caplog.text
    shutil.copytree(snapshot, place / "download")
    assert np.array_equal(ours, features("--run", "download", "--model", NAME))
    # As published: 48 slices, not the scan's own five.
    assert np.array_equal(ours, features("--run", str(snapshot), "--preset", "mri-published-48"))
    assert not np.array_equal(ours, features("--run", str(snapshot), "--preset", "mri"))
    assert main(["evaluate", str(snapshot)]) == 1
    assert "give --studies" in capsys.readouterr().err


def test_published_weights_that_cannot_be_told_or_do_not_fit(snapshot, place, run, capsys, monkeypatch):
    other = place / "download"
    shutil.copytree(snapshot, other)
    for arguments, words in (
        ([str(other)], "name it with --model"),
        ([str(other), "--model", "resnet"], "no model 'resnet'"),
        ([run, "--model", NAME], "leave out --model"),
        ([str(place / "nothing")], "docs/checkpoints.md"),
        ([str(place / "studies")], "docs/checkpoints.md"),
        ([f"nobody/{NAME}x"], "not a finished run"),
    ):
        assert main(["evaluate", *arguments, *given()]) == 1
        err = capsys.readouterr().err
        assert words in err and "Traceback" not in err, err
    save_file({"visual.trunk.cls_token": torch.zeros(1, 1, 48)}, other / "model.safetensors")
    assert main(["evaluate", str(other), "--model", NAME, *given()]) == 1
    assert "lacks" in capsys.readouterr().err
    for file in snapshot.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr(published, "Tokenizer", offline)
    assert main(["evaluate", str(snapshot), *given()]) == 1
    assert "no tokenizer: put tokenizer.json or vocab.txt of microsoft/" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["vocab.txt", "tokenizer.json"])
def test_one_tokenizer_file_beside_the_weights_will_do(snapshot, place, kept, caplog):
    words = train_tokenizer(["This study shows: mass bleed."], place / "whole").tokenizer.get_vocab()
    (snapshot / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.get)))
    for file in (*snapshot.glob("tokenizer*"), snapshot / "vocab.txt"):
        if file.name != kept:
            file.unlink()
    assert main(["evaluate", str(snapshot), *given()]) == 0 and not caplog.text


def test_a_tokenizer_beside_the_weights_that_is_not_used_is_said(snapshot, place, monkeypatch, caplog, capsys):
    monkeypatch.setattr(published, "Tokenizer", lambda source, n: (Tokenizer if Path(source).exists() else offline)(source, n))
    (snapshot / "tokenizer.json").write_text("{}")
    assert main(["evaluate", str(snapshot), *given()]) == 1
    assert f"{snapshot}: its tokenizer is not used, but that of microsoft/" in caplog.text
    err = capsys.readouterr().err
    assert "no tokenizer: put tokenizer.json or vocab.txt of microsoft/BiomedNLP-BiomedBERT" in err and "Traceback" not in err


def offline(source, length):
    raise OSError(f"{source} is not in the cache, and there is no network")


@pytest.mark.parametrize(
    "source, name",
    [
        ("zch0414/clip-vit_base-scan_study-dualdinotxt1568", NAME),
        (f"x/models--zch0414--clip-vit_base-scan_study-dualdinotxt1568/snapshots/0a1b/{'model.safetensors'}", NAME),
        (f"weights/{NAME}/epoch_20.pt", NAME), (f"weights/{NAME}.pt", NAME), ("hlip-2025_10_08", "ablate_seqposemb_"
         "vit_base_multiscan_h2_dinotxt1568"), ("runs/mine", ""), ("weights/epoch_20.pt", ""),
    ],
)  # fmt: skip
def test_the_variant_is_told_from_names(source, name):
    assert published.name_in(source) == name


def test_every_published_model_has_presets():
    from hlip.data import PRESETS

    for name in VARIANTS:
        preset = published.published_preset(name)
        names = {preset} if isinstance(preset, str) else set(preset.values())
        assert names <= set(PRESETS) and ("chest-ct" in names) == name.endswith("2744")
    assert published.published_preset("vit_base_multiscan_h2_token1176")["mri"] == "mri-published-144"
    assert published.published_preset(NAME)["mri"] == "mri-published-48"


def test_the_documented_lines_of_python_run(snapshot, place, capsys):
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "open_model" in block.split("```")[0]]
    shutil.copytree(snapshot, place / "path" / "to" / "snapshot")
    (place / "studies").rename(place / "test")
    exec(compile(code, "checkpoints.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["s0", "s1", "s2", "s3"] and "meningioma" in lines[0]
