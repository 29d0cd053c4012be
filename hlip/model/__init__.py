"""The HLIP model: encoder, text tower, checkpoints, published variants."""

from .batch import MEAN, STD, StudyBatch
from .checkpoint import LoadReport, load_checkpoint, load_mae
from .clip import HLIP, create_model
from .encoder import HLIPEncoder
from .text import TINY_BERT, Tokenizer, train_tokenizer
from .variants import VARIANTS, Encoder, Variant, variant

__all__ = [
    "HLIP",
    "MEAN",
    "STD",
    "TINY_BERT",
    "VARIANTS",
    "Encoder",
    "HLIPEncoder",
    "LoadReport",
    "StudyBatch",
    "Tokenizer",
    "Variant",
    "create_model",
    "load_checkpoint",
    "load_mae",
    "train_tokenizer",
    "variant",
]
