"""Text models and tokenizers from a folder or the hub. Code that lies beside them is never run, nor is it asked about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from torch import nn

_CODE = "trust_remote_code"  # what transformers' messages about code in a folder name


def read_config(source: str | Path):
    """The ``transformers`` config of a text model, without what names code or kernels to be fetched.

    Raises:
        OSError: none is there. ValueError: it needs code of its own.
    """
    from transformers import AutoConfig

    with _code_is_refused(source):
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    if hasattr(config, "auto_map"):
        del config.auto_map
    config._attn_implementation = None
    return config


def load_weights(source: str | Path, config) -> nn.Module:
    """The pretrained text model itself, without a pooling layer.

    Raises:
        OSError: it is not there. ValueError: it needs code of its own, or its file holds more than tensors.
    """
    from transformers import AutoModel

    options = {} if config.is_encoder_decoder else {"add_pooling_layer": False}
    try:
        with _code_is_refused(source):
            model = AutoModel.from_pretrained(str(source), config=config, trust_remote_code=False, **options)
    except UnpicklingError as error:  # its message offers to run what is in the file
        raise ValueError(
            f"{source}: its weights cannot be read safely: damaged, or more than tensors in plain containers"
        ) from error
    return model.encoder if config.is_encoder_decoder else model


def load_tokenizer(source: str | Path):
    """The ``transformers`` tokenizer in a folder, or of a Hugging Face id.

    Raises:
        OSError, ValueError: there is none, it is damaged, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    with _code_is_refused(source):
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    tokenizer.init_kwargs.pop("auto_map", None)  # would be written beside what is saved, and refused there
    return tokenizer


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
