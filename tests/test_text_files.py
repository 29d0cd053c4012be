"""Text models and tokenizers from folders: nothing in them is run, and the published kinds load from what people have."""

import json

import pytest
import torch
from tiny import TEXT, tiny_variant

pytest.importorskip("open_clip")

from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

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


# ------------------------------------------------------------------ a BERT's tokenizer from one file


def bare(folder, *files):
    """A folder with nothing but these files of a BERT's tokenizer, as people copy them."""
    folder.mkdir(parents=True, exist_ok=True)
    if "vocab.txt" in files:
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    if "tokenizer.json" in files:
        BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )
    return folder


@pytest.mark.parametrize("files", [("vocab.txt",), ("tokenizer.json",), ("vocab.txt", "tokenizer.json")])
def test_one_file_of_a_tokenizer_will_do(tmp_path, files):
    tokenizer = Tokenizer(bare(tmp_path, *files), 4)
    expected = [[2, 5, 3, 0], [2, 7, 6, 3]]
    assert tokenizer(["Mass", "no bleed of the mass"]).tolist() == expected
    assert tokenizer.vocab_size == len(WORDS)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer(tmp_path / "saved", 4)
    assert again(["Mass", "no bleed of the mass"]).tolist() == expected and again.tokenizer.mask_token == "[MASK]"


def test_a_tokenizer_that_cannot_pad_is_refused_when_it_is_opened(tmp_path):
    from tokenizers import Tokenizer as Plain
    from tokenizers.models import WordLevel

    Plain(WordLevel({"<unk>": 0, "mass": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"^{tmp_path}: the tokenizer has no padding token"):
        Tokenizer(tmp_path)


# ------------------------------------------------------------------ CXR-BERT, whose own code is not needed


@pytest.fixture
def cxr_bert(tmp_path):
    """As microsoft/BiomedVLP-CXR-BERT-specialized: a BERT's weights under ``bert.``, heads of its own, and code."""
    config = BertConfig(**TEXT)
    names = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    ours = {"model_type": "cxr-bert", "architectures": ["CXRBertModel"], "auto_map": names, "projection_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), **ours}))
    code = {"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]}
    settings = {"do_lower_case": True, "tokenizer_class": "CXRBertTokenizer", "auto_map": code}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("configuration_cxrbert", "modeling_cxrbert"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    return bare(tmp_path, "vocab.txt")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_cxr_bert_loads_as_the_bert_it_is(cxr_bert, never_asked, kind):
    torch.manual_seed(1)
    trained = BertModel(BertConfig(**TEXT), add_pooling_layer=False).state_dict()
    state = {f"bert.{name}": value for name, value in trained.items()}
    state["cls_projection_head.dense_to_hidden.weight"] = torch.zeros(8, 16)
    if kind == "bin":
        torch.save(state, cxr_bert / "pytorch_model.bin")
    else:
        save_file(state, cxr_bert / "model.safetensors", metadata={"format": "pt"})
    text = create_model(tiny_variant(), text=cxr_bert, text_pretrained=True).text
    assert text.transformer.state_dict().keys() == trained.keys()
    for name, value in text.transformer.state_dict().items():
        assert torch.equal(value, trained[name]), name
    fresh = create_model(tiny_variant(), text=cxr_bert).text.transformer.state_dict()
    assert {name: value.shape for name, value in fresh.items()} == {name: value.shape for name, value in trained.items()}
    assert Tokenizer(cxr_bert)(["Mass", "no bleed"]).tolist() == [[2, 5, 3, 0], [2, 7, 6, 3]]
    assert text(Tokenizer(cxr_bert)(["Mass", "no bleed"])).shape == (2, 24)


def test_cxr_berts_tokenizer_needs_its_vocabulary_only(cxr_bert, never_asked):
    (cxr_bert / "tokenizer_config.json").unlink()  # config.json, which names code, stays
    assert Tokenizer(cxr_bert)(["Mass", "no bleed"]).tolist() == [[2, 5, 3, 0], [2, 7, 6, 3]]


def test_a_tokenizer_taken_over_from_cxr_bert_opens_again(cxr_bert, tmp_path, never_asked):
    Tokenizer(cxr_bert).save(tmp_path / "run")
    assert Tokenizer(tmp_path / "run")("mass").tolist() == [[2, 5, 3]]


def test_weights_that_are_not_all_there_are_refused(cxr_bert):
    save_file({"bert.embeddings.LayerNorm.bias": torch.zeros(16)}, cxr_bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^{cxr_bert}: its weights lack 2[0-9] of those of a bert, e.g. embeddings"):
        create_model(tiny_variant(), text=cxr_bert, text_pretrained=True)
