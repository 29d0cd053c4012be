"""HLIP: a vision-language model on whole, uncurated CT and MRI studies (arXiv 2505.21862), on ragged attention kernels."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import StudyBatch, create_model, load_checkpoint

__all__ = ["StudyBatch", "create_model", "load_checkpoint"]


def __getattr__(name: str):
    """The model's names, loaded on first use: reading studies needs none of it."""
    if name in __all__:
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
