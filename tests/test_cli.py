"""The command line as a user meets it: help, good and bad paths, and a small run from end to end."""

import numpy as np
import pytest
import yaml
from data_files import volume

pytest.importorskip("open_clip")

from hlip.cli import main


@pytest.fixture
def study(tmp_path):
    volume(tmp_path / "studies" / "a" / "flair.nii.gz", (7, 40, 36), (1.0, 1.0, 4.0))
    volume(tmp_path / "studies" / "b" / "t1.nii.gz", (9, 40, 36), (1.0, 1.0, 4.0))
    return tmp_path / "studies"


@pytest.mark.parametrize("command", ["info", "prepare", "embed", "evaluate", "explain", "train", "demo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 150


def test_no_command_and_unknown_commands_are_usage_errors(capsys):
    for arguments in ([], ["cure"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_info_counts_tokens_and_goes_on_after_a_bad_path(study, tmp_path, capsys):
    (tmp_path / "bad.nii.gz").write_bytes(b"not an image")
    assert main(["info", str(study / "a"), str(tmp_path / "bad.nii.gz"), str(study / "b")]) == 1
    out, err = capsys.readouterr()
    assert "bad.nii.gz" in err
    # 7 slices in patches of 6, 224 x 224 in patches of 16: 2 x 14 x 14.
    assert out.count("392 tokens in all") == 2 and "7 x 224 x 224" in out and "9 x 224 x 224" in out
    assert main(["info", str(study)]) == 0


def test_info_without_anything_to_read(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["info"]) == 1
    assert main(["info", "--presets"]) == 0
    assert main(["info", str(tmp_path), "--model", "resnet"]) == 1
    assert "vit_base" in capsys.readouterr().err


def test_train_evaluate_embed(tmp_path, capsys, monkeypatch, study):
    pytest.importorskip("nilearn")
    monkeypatch.chdir(tmp_path)
    config = {
        "run": "run", "epochs": 1, "batch_size": 4,
        "data": {"train": "simulated", "num_train": 8, "num_valid": 8, "image_size": 32, "max_slices": 8, "workers": 0},
        "model": {"image_size": [24, 32, 32], "patch_size": [4, 16, 16], "width": 48, "heads": 2, "embed_dim": 16,
                  "levels": ["slice", "study"]},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", "c.yaml", "--set", "lr=1e-4", "--set", "model.embed_dim=8"]) == 0
    assert "macro mean" in capsys.readouterr().out
    assert main(["evaluate", "run"]) == 0
    assert "hemorrhage" in capsys.readouterr().out
    (tmp_path / "p.yaml").write_text("classes: [mass, bleed]\n")
    assert main(["embed", str(study), "--run", "run", "--out", "f/x.npz", "--prompts", "p.yaml"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 studies" in out and "mass" in out
    with np.load("f/x.npz") as stored:
        assert stored["features"].shape == (2, 2, 8) and [str(s).rsplit("/", 1)[-1] for s in stored["studies"]] == ["a", "b"]
    (tmp_path / "labels.csv").write_text("study,mass,bleed\na,1,0\nb,0,1\n")
    assert main(["evaluate", "run", "--studies", str(study), "--labels", "labels.csv", "--prompts", "p.yaml"]) == 0
    assert main(["evaluate", "run", "--studies", str(study)]) == 1
    assert "--labels" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("colour: red\n")
    (tmp_path / "good.yaml").write_text(f"run: {tmp_path / 'c.yaml'}\ndata: {{train: {tmp_path / 'nowhere'}}}\n")
    train = ["train", "--config", str(tmp_path / "good.yaml")]
    for arguments, word in (
        (["train", "--config", str(tmp_path / "c.yaml")], "colour"),
        (["train", "--config", str(tmp_path / "none.yaml")], "none.yaml"),
        (train, "c.yaml is a file, expected a folder"),
        ([*train, "--set", "lr"], "NAME=VALUE"),
        ([*train, "--set", "run.x=1"], "run.x cannot be set: run is one value"),
        ([*train, "--set", "data.train=[a"], "--set data.train=[a: '[a' is not readable as YAML"),
        ([*train, "--set", "run=2024-99-99"], "--set run=2024-99-99: '2024-99-99' is not readable as YAML (month must be in"),
        ([*train, "--set", "model.pool=dino"], "good.yaml: model.pool must be cls or dinotxt"),
        (["embed", str(tmp_path), "--run", str(tmp_path)], "config.yaml"),
        (["embed", str(tmp_path), "--run", str(tmp_path), "--device", "foo"], "--device 'foo' cannot be used here"),
        (["evaluate", str(tmp_path), "--device", "cuda:99"], "--device 'cuda:99' cannot be used here"),
        (["evaluate", str(tmp_path / "run")], "not a finished run"),
    ):
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert word in err and "Traceback" not in err and err.count("\n") <= 2, err


def test_what_the_system_refuses_is_one_line_and_bugs_are_not_hidden(monkeypatch, capsys):
    from hlip.cli import info

    def raises(error):
        def function(_):
            raise error

        return function

    monkeypatch.setattr(info, "info", raises(PermissionError(13, "Permission denied", "studies/a")))
    assert main(["info", "a"]) == 1
    assert capsys.readouterr().err == "hlip info: studies/a: Permission denied\n"
    monkeypatch.setattr(info, "info", raises(OSError("run: saving failed")))
    assert main(["info", "a"]) == 1
    assert capsys.readouterr().err == "hlip info: run: saving failed\n"
    monkeypatch.setattr(info, "info", raises(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["info", "a"])


def test_a_trained_run_is_resumed_or_replaced_only_when_asked(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "c.yaml").write_text(f"run: {tmp_path / 'run'}\ndata: {{train: {tmp_path / 'nowhere'}}}\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 1
    assert "already holds a trained run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(tmp_path / "c.yaml"), "--resume", "--overwrite"])
    assert stopped.value.code == 2
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == b"weights"
