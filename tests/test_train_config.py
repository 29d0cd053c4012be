"""The training config: what it refuses and how it says so, and that examples/train.yaml explains every field."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("open_clip")

from hlip.data import Limits
from hlip.train import load_config
from hlip.train.config import DataConfig, ModelConfig, TrainConfig, config_from
from hlip.train.inputs import how_to_read, make_datasets
from hlip.train.run import build_model, check_model, check_text_length

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train.yaml"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"run": " "}, "run must be a folder"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"beta2": 1.0}, "beta2"),
        ({"max_minutes": -1.0}, "max_minutes"),
        ({"evaluate_every": -1}, "evaluate_every"),
        ({"seed": -1}, "seed"),
        ({"data": {"max_scans": -1}}, r"data\.max_scans must be at least 0 \(all\), got -1"),
        ({"data": {"min_slices": 0}}, r"data\.min_slices"),
        ({"model": {"pool": "dino"}}, r"model\.pool must be cls or dinotxt, got 'dino'"),
        ({"model": {"levels": ["slice", "patient"]}}, r"model\.levels must be one of slice, scan, study"),
        ({"model": {"prefix": ["reg"]}}, r"model\.prefix"),
        ({"model": {"heads": 5}}, r"model\.heads must be a divisor of width, 192, got 5"),
        ({"model": {"patch_size": [4, 0, 16]}}, r"model\.patch_size"),
        ({"model": {"width": 60, "heads": 4, "rotary": True}}, r"model\.rotary must be false where .* .60 / 4., got True"),
        ({"model": {"context_length": 1}}, r"model\.context_length"),
        ({"epochs": 0, "model": {"width": 6}}, "epochs must be .*; model.width must be"),
    ],
)
def test_values_that_make_no_sense_are_named_with_what_was_expected(changes, words):
    with pytest.raises(ValueError, match=f"^mine.yaml: {words}"):
        config_from(changes, source="mine.yaml")


@pytest.mark.parametrize(
    "model, words",
    [
        ({"loss": "dual", "prefix": ["cls"]}, "dual needs a dual model"),
        ({"loss": "siglip", "name": "clip-vit_base-scan_study-dualdinotxt1568"}, "siglip needs a logit bias"),
        ({"name": "resnet"}, "no model 'resnet'"),
        ({"backend": "fast"}, "no backend 'fast'; choose auto or one of reference"),
        ({"text_pretrained": True}, "the tiny text model has no weights"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_before_anything_is_built(model, words):
    with pytest.raises(ValueError, match=words):
        check_model(config_from({"model": model}).model)


def test_texts_longer_than_the_text_model_takes_are_refused():
    config = config_from({"model": {"context_length": 512, "levels": ["study"], "width": 48}}).model
    model = build_model(config)
    with pytest.raises(ValueError, match=r"model\.context_length: 512 .* \(tiny\) takes, 256"):
        check_text_length(config, model)
    check_text_length(dataclasses.replace(config, context_length=256), model)


def test_a_text_model_out_of_reach_is_one_line_and_names_its_field(monkeypatch):
    from open_clip import hf_model

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(hf_model.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"^model\.text: 'some/bert' can be loaded neither .*couldn't connect to the hub\.\)$"):
        build_model(config_from({"model": {"text": "some/bert"}}).model)


def test_files_in_other_encodings(tmp_path):
    path = tmp_path / "c.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("prompt: 'Étude : '", encoding=encoding)
        assert load_config(path).prompt == "Étude : "
    path.write_text("prompt: 'Étude : '", encoding="latin-1")
    with pytest.raises(ValueError, match=r"c\.yaml: not UTF-8 text .at byte"):
        load_config(path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr: 1e-3\ndata: {workers: 1}\nlr: 1e-4\n", "lines 1 and 3 both set 'lr': keep one"),
        ("data:\n  workers: 1\n  train: x\n  workers: 2\n", "lines 2 and 4 both set 'workers'"),
        ("", "nothing is in it; examples/train.yaml"),
        ("# lr: 3e-4\n", "nothing is in it"),
        ("[" * 5000, "not readable as YAML: nested too deeply"),
        ("epochs: 1\nrun: 2024-99-99\n", "line 2: '2024-99-99': month must be in 1..12; text goes into quotation marks"),
    ],
)
def test_mistakes_in_yaml_are_told_with_file_and_line(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'c.yaml'}: .*{words}"):
        load_config(tmp_path / "c.yaml")


def test_names_may_be_merged_and_all_defaults_asked_for(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {<<: {workers: 1, cache: c}, workers: 2}\n")
    assert (load_config(tmp_path / "c.yaml").data.workers, load_config(tmp_path / "c.yaml").data.cache) == (2, "c")
    (tmp_path / "c.yaml").write_text("{}")
    assert load_config(tmp_path / "c.yaml") == TrainConfig()


def test_overrides_of_what_is_not_there():
    with pytest.raises(ValueError, match=r"run\.x cannot be set: run is one value, 'r'"):
        config_from({"run": "r"}, {"run.x": 1})
    assert config_from({"data": None, "model": None}) == TrainConfig()  # every field commented out
    assert config_from({"data": None}, {"data.workers": 3}).data.workers == 3


def test_reading_options_reach_the_reader(tmp_path):
    assert Limits().min_slices == DataConfig().min_slices and Limits().follow_links == DataConfig().follow_links
    assert set(how_to_read(DataConfig())) == {"preset", "cache"}  # and so leave the cache as it was
    (tmp_path / "t" / "s").mkdir(parents=True)
    (tmp_path / "t" / "s" / "report.txt").write_text("Normal.")
    (tmp_path / "v" / "s").mkdir(parents=True)
    (tmp_path / "l.csv").write_text("study,mass\ns,1\n")
    (tmp_path / "p.yaml").write_text("classes: [mass]\n")
    data = {"train": str(tmp_path / "t"), "valid": str(tmp_path / "v"), "labels": str(tmp_path / "l.csv")}
    values = {"data": {**data, "follow_links": True, "min_slices": 1}, "prompts": str(tmp_path / "p.yaml")}
    for studies in make_datasets(config_from(values))[:2]:
        assert studies.limits == {"follow_links": True, "min_slices": 1}
    for field, value, words in (("preset", "mrii", "no preset named 'mrii'"), ("cache", str(tmp_path / "l.csv"), "is a file")):
        with pytest.raises(ValueError, match=rf"data\.{field}: .*{words}"):
            make_datasets(config_from({**values, "data": {**data, field: value}}))


# ------------------------------------------------------------------ the example


def explained():
    """Every field that examples/train.yaml names: (dotted name, commented out, value, explanation)."""
    group = ""
    for line in EXAMPLE.read_text().splitlines():
        found = re.fullmatch(r"( *)(# )?(\w+):(.*?)(?: # (.*))?", line)
        if found:
            indent, commented, name, value, explanation = found.groups()
            if not indent and not commented and not value.strip():
                group = f"{name}."
                continue
            group = group if indent else ""
            yield group + name, bool(commented), yaml.safe_load(value), (explanation or "").strip()


def defaults():
    groups = {"": TrainConfig(), "data.": DataConfig(), "model.": ModelConfig()}
    for group, config in groups.items():
        for name, value in vars(config).items():
            if not dataclasses.is_dataclass(value):
                yield group + name, list(value) if isinstance(value, tuple) else value


def test_the_example_explains_every_field_and_no_other():
    assert sorted(name for name, *_ in explained()) == sorted(name for name, _ in defaults())
    assert all(len(explanation) > 5 for *_, explanation in explained())


def test_what_the_example_leaves_commented_out_is_the_default():
    expected = dict(defaults())
    for name, commented, value, _ in explained():
        assert not commented or value == expected[name], name


def test_the_example_reads_as_it_is_and_with_every_field(tmp_path):
    load_config(EXAMPLE)
    whole = tmp_path / "whole.yaml"
    whole.write_text(re.sub(r"(?m)^( *)# (?=\w+: )", r"\1", EXAMPLE.read_text()))
    config = load_config(whole)
    given = {name: value for name, _, value, _ in explained()}
    for group, part in (("", config), ("data.", config.data), ("model.", config.model)):
        for name, value in vars(part).items():
            if not dataclasses.is_dataclass(value):
                assert (list(value) if isinstance(value, tuple) else value) == given[group + name], name
