"""Text models and tokenizers from a folder or the hub. Code that lies beside them is never run, nor is it asked about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from torch import nn

# microsoft/BiomedVLP-CXR-BERT-specialized: a BERT under another name, whose own code adds heads that are not used here.
_CXR_BERT, _CXR_BERT_TOKENIZER = "cxr-bert", "CXRBertTokenizer"
_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_CODE = "trust_remote_code"  # what transformers' messages about code in a folder name


def read_config(source: str | Path):
    """The ``transformers`` config of a text model, without what names code or kernels to be fetched.

    Raises:
        OSError: none is there. ValueError: it needs code of its own.
    """
    from transformers import AutoConfig, BertConfig

    try:
        with _code_is_refused(source):
            config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except ValueError:
        values, _ = BertConfig.get_config_dict(str(source))
        if values.get("model_type") != _CXR_BERT:
            raise
        left_out = ("model_type", "architectures", "auto_map")
        config = BertConfig(**{name: value for name, value in values.items() if name not in left_out})
    if hasattr(config, "auto_map"):
        del config.auto_map
    config._attn_implementation = None
    return config


def load_weights(source: str | Path, config) -> nn.Module:
    """The pretrained text model itself, without a pooling layer.

    Raises:
        OSError: it is not there. ValueError: it needs code of its own, or its file lacks weights, or holds more.
    """
    from transformers import AutoModel

    options = {} if config.is_encoder_decoder else {"add_pooling_layer": False}
    try:
        with _code_is_refused(source):
            model, found = AutoModel.from_pretrained(
                str(source), config=config, trust_remote_code=False, output_loading_info=True, **options
            )
    except UnpicklingError as error:  # its message offers to run what is in the file
        raise ValueError(
            f"{source}: its weights cannot be read safely: damaged, or more than tensors in plain containers"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{source}: its weights lack {len(missing)} of those of a {config.model_type}, e.g. {missing[0]}")
    return model.encoder if config.is_encoder_decoder else model


def load_tokenizer(source: str | Path):
    """The ``transformers`` tokenizer in a folder, or of a Hugging Face id. A bare ``vocab.txt`` or ``tokenizer.json`` will do.

    Raises:
        OSError, ValueError: there is none, it is damaged, it needs code of its own, or it cannot pad texts.
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    if _is_plain_bert(source):
        tokenizer = BertTokenizerFast.from_pretrained(str(source))
    else:
        with _code_is_refused(source):
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    words = tokenizer.get_vocab()
    for kind, word in _SPECIAL.items():
        if getattr(tokenizer, f"{kind}_token") is None and word in words:  # a bare tokenizer.json does not say
            setattr(tokenizer, f"{kind}_token", word)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{source}: the tokenizer has no padding token ([PAD] is not in its vocabulary): add its tokenizer_config.json"
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # would be written beside what is saved, and refused there
    return tokenizer


def _is_plain_bert(source: str | Path) -> bool:
    """Whether a BERT's own tokenizer reads what is there, and transformers could not tell."""
    from transformers import BertConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = Path(source)
    if (folder / "vocab.txt").is_file() and not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        if not (folder / "config.json").is_file() or BertConfig.get_config_dict(source)[0].get("model_type") == _CXR_BERT:
            return True
    return get_tokenizer_config(str(source)).get("tokenizer_class") == _CXR_BERT_TOKENIZER


@contextmanager
def _code_is_refused(source: str | Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if _CODE not in str(error):
            raise
        raise ValueError(
            f"{source}: it comes with Python code of its own (auto_map), which is never run: use one of a kind that "
            "transformers knows, or take auto_map out of its JSON files if they describe such a kind"
        ) from error
