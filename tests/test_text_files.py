"""Text models and tokenizers from folders: nothing in them is run, and the published kinds load from what people have."""

import json

import pytest
import torch
from tiny import TEXT, tiny_variant

pytest.importorskip("open_clip")

from transformers import BertConfig, BertModel

from hlip.model import Tokenizer, create_model, train_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mass", "bleed", "no", "of", "the"]


@pytest.fixture
def never_asked(monkeypatch):
    """As someone who answers yes to everything."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    yield
    assert not asked


def with_code(folder, *files):
    """Adds code to a folder, and its names to the JSON files in it."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').write('')\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for file in files:
        path = folder / file
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, "model_type": "evil", "tokenizer_class": "Evil", "auto_map": names}))
    return folder


def test_code_beside_a_tokenizer_is_not_run(tmp_path, never_asked):
    train_tokenizer(["a mass"], tmp_path)
    with_code(tmp_path, "tokenizer_config.json")
    with pytest.raises(ValueError, match=f"^{tmp_path}: it comes with Python code of its own .* never run"):
        Tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pretrained", [False, True])
def test_code_beside_a_text_model_is_not_run(tmp_path, never_asked, pretrained):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    with_code(tmp_path, "config.json")
    with pytest.raises(ValueError, match=f"^{tmp_path}: it comes with Python code of its own"):
        create_model(tiny_variant(), text=tmp_path, text_pretrained=pretrained)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_kind_is_passed_over(tmp_path, never_asked):
    """The model is a BERT as transformers has it; what is saved for it names no code."""
    trained = BertModel(BertConfig(**TEXT), add_pooling_layer=False)
    trained.save_pretrained(tmp_path)
    train_tokenizer(["a mass"], tmp_path)
    with_code(tmp_path, "config.json", "tokenizer_config.json")
    for file in ("config.json", "tokenizer_config.json"):
        known = {"model_type": "bert", "tokenizer_class": "BertTokenizer"}
        (tmp_path / file).write_text(json.dumps({**json.loads((tmp_path / file).read_text()), **known}))
    model = create_model(tiny_variant(), text=tmp_path, text_pretrained=True)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, model.text.transformer.state_dict()[name]), name
    Tokenizer(tmp_path).save(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_text_model_are_not_run(tmp_path, never_asked):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    BertConfig(**TEXT).save_pretrained(tmp_path)
    torch.save({"bert.x": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*cannot be read safely"):
        create_model(tiny_variant(), text=tmp_path, text_pretrained=True)
    assert not (tmp_path / "ran").exists()
