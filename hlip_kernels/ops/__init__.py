"""The ops: public functions that check their arguments, and the ``torch.library`` ops under them (namespace ``hlip``)."""

from .attention import attention
from .patchify import patch_grids, patchify
from .segment_mean import segment_mean
from .switch_level import switch_level

__all__ = ["attention", "patch_grids", "patchify", "segment_mean", "switch_level"]
