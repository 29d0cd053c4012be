"""HLIP: a vision-language model on whole, uncurated CT and MRI studies (arXiv 2505.21862), on ragged attention kernels."""

from .model import StudyBatch, create_model, load_checkpoint

__all__ = ["StudyBatch", "create_model", "load_checkpoint"]
