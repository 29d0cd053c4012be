"""`hlip explain`: maps that lie over the scans, and a picture."""

import finished_run
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from data_files import volume

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from hlip.cli import main
from hlip.evaluate import benchmark, zero_shot_classifier
from hlip.explain import occlusion, relevance
from hlip.train.prepared import prepare_volumes
from hlip.train.run import load_run

place, run = finished_run.place, finished_run.run


def explain(*arguments, out="maps"):
    return main(["explain", "studies/s0", "--run", "run", "--out", out, *arguments])


def expected(prompts, weights, method=relevance, path="studies/s0", **batch):
    """Maps for a direction that is made of a class's rows."""
    loaded = load_run("run")
    volumes, max_value, _ = prepare_volumes(path, "mri-published-48")
    classifier = zero_shot_classifier(loaded.model, loaded.tokenizer, benchmark(prompts))
    return volumes, method(loaded.model, [v.voxels for v in volumes], weights(classifier), max_value=max_value)


@pytest.fixture
def study(place, run):
    """Two scans; a name that is no file name."""
    volume(place / "studies" / "s0" / "a b: ü;.nii.gz", (7, 30, 20), (1.0, 1.5, 4.0))
    return place / "studies" / "s0"


def test_maps_and_a_picture(study, place, capsys):
    assert explain("--text", "mass.") == 0
    (place / "one.yaml").write_text("classes: [mass]\n")
    volumes, maps = expected("one.yaml", lambda c: c.weights[0])
    out = capsys.readouterr().out
    assert out.startswith("mass.: cosine ") and "2 maps and relevance.png -> maps" in out
    assert {file.name for file in (place / "maps").iterdir()} == {"01-a-b.nii.gz", "02-t1.nii.gz", "relevance.png"}
    for made, heat, name in zip(volumes, maps, ("01-a-b", "02-t1"), strict=True):
        image = sitk.ReadImage(str(place / "maps" / f"{name}.nii.gz"))
        assert np.allclose(sitk.GetArrayFromImage(image), heat.numpy(), atol=1e-5)
        corner = image.TransformIndexToPhysicalPoint((5, 4, 3))
        assert np.allclose(corner, (made.affine @ [3, 4, 5, 1])[:3], atol=1e-3)
    strongest = max(range(2), key=lambda i: float(maps[i].max()))
    slice_ = int(maps[strongest].amax((1, 2)).argmax()) + 1
    assert f"1.00  {slice_} of 48" in out.splitlines()[2] and volumes[strongest].name in out.splitlines()[2]


def test_each_study_has_a_folder_of_its_own(run, place, capsys):
    assert main(["explain", "studies/s1/", "--run", "run", "--text", "mass"]) == 0
    assert {file.name for file in (place / "explained" / "s1").iterdir()} == {"01-xt1.nii.gz", "relevance.png"}
    assert "-> explained/s1" in capsys.readouterr().out


@pytest.mark.parametrize("entry, rows, what", [
    ({"kind": "multiclass", "classes": ["mass", "bleed", "normal"]}, lambda c: c.weights[1] - (c.weights[0] + c.weights[2]) / 2,
     "bleed rather than the other classes"),
    ({"classes": ["mass", "bleed"], "against": "no {c}"}, lambda c: c.weights[1] - c.against[1], "bleed rather than not"),
    ({"classes": ["mass", "bleed"]}, lambda c: c.weights[1], "bleed"),
    ({"kind": "multiclass", "classes": ["bleed"]}, lambda c: c.weights[0], "bleed"),
])  # fmt: skip
def test_a_class_of_prompts(run, place, capsys, entry, rows, what):
    (place / "p.yaml").write_text(yaml.safe_dump(entry))
    assert explain("--prompts", "p.yaml", "--class", "bleed", "--method", "occlusion") == 0
    _, (heat,) = expected("p.yaml", rows, occlusion)
    assert capsys.readouterr().out.startswith(f"{what}: cosine ")
    assert torch.equal(heat, torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(place / "maps" / "01-t1.nii.gz")))))


@pytest.mark.parametrize("arguments, words", [
    ([], "give either --text, or --prompts with --class"),
    (["--text", "mass", "--prompts", "p.yaml"], "give either --text"),
    (["--text", "mass", "--class", "mass"], "give either --text"),
    (["--prompts", "p.yaml", "--class", "edema"], "--class: 'edema' is none of p.yaml: mass, bleed"),
    (["--text", "mass", "--out", "p.yaml"], "--out: {place}/p.yaml is a file, expected a folder"),
    (["--text", "mass", "--preset", "mir"], "'mir'"),
])  # fmt: skip
def test_what_cannot_be_explained_is_told(run, place, capsys, arguments, words):
    assert explain(*arguments) == 1
    assert words.format(place=place) in capsys.readouterr().err and not (place / "maps").exists()


def test_a_study_that_cannot_be_read_or_written(run, place, capsys, monkeypatch):
    assert main(["explain", "nowhere", "--run", "run", "--text", "mass"]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err

    def full(image, name):
        open(name, "wb").write(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(sitk, "WriteImage", full)
    assert explain("--text", "mass") == 1
    assert "No space left" in capsys.readouterr().err and not list((place / "maps").iterdir())
