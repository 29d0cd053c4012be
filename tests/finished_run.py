"""Fixtures: a finished run with fresh weights, and studies with labels and prompts to use it on."""

import pytest
import torch
import yaml
from data_files import volume


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder, taken as the working one, with four studies, their labels and prompts."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        volume(tmp_path / "studies" / f"s{i}" / f"{i * 'x'}t1.nii.gz", (5, 20, 20), (1.0, 1.0, 4.0))
    (tmp_path / "labels.csv").write_text("study,mass,bleed\n" + "".join(f"s{i},{i % 2},{i // 2}\n" for i in range(4)))
    (tmp_path / "p.yaml").write_text("classes: [mass, bleed]\n")
    return tmp_path


@pytest.fixture
def run(place):
    """A finished run that says it was trained on 48 slices, with fresh weights."""
    from safetensors.torch import save_file

    from hlip.model import train_tokenizer
    from hlip.train.config import config_from
    from hlip.train.run import build_model

    model = {"image_size": [48, 224, 224], "patch_size": [8, 56, 56], "width": 24, "heads": 2, "embed_dim": 8,
             "levels": ["scan"]}  # fmt: skip
    data = {"train": "train", "valid": "studies", "labels": "labels.csv", "preset": "mri-published-48", "workers": 0}
    values = {"run": "run", "data": data, "model": model, "prompts": "p.yaml"}
    tokenizer = train_tokenizer(["This study shows: mass bleed."], place / "run" / "tokenizer")
    torch.manual_seed(0)
    weights = build_model(config_from(values).model, vocab_size=tokenizer.vocab_size).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, place / "run" / "model.safetensors")
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    return "run"
