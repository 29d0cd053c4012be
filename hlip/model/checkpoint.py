"""Loads published and own checkpoints, safely: safetensors, or torch files restricted to tensors and plain containers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..storage import reason
from .position import inflate_table

log = logging.getLogger(__name__)

_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_RENAMED = {"visual.trunk.series_posemb": "visual.trunk.sequential_posemb"}  # before June 2025
_IGNORED = ("text.transformer.embeddings.position_ids",)  # a buffer of older transformers


@dataclass
class LoadReport:
    """What loading did.

    Attributes:
        path: the file that was read.
        missing: names the model has and the checkpoint lacks (they keep their fresh values).
        unexpected: names the checkpoint has and the model lacks (they are not used).
        resized: names whose position tables had another grid and were interpolated.
    """

    path: Path
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True when every name of the model was found and every name of the checkpoint was used."""
        return not (self.missing or self.unexpected)

    def __str__(self) -> str:
        if self and not self.resized:
            return f"{self.path}: all weights loaded"
        parts = [
            f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            for what, names in (("missing", self.missing), ("unexpected", self.unexpected), ("resized", self.resized))
            if names
        ]
        return f"{self.path}: " + "; ".join(parts)


def load_checkpoint(model: nn.Module, source: str | Path, *, strict: bool = False) -> LoadReport:
    """Loads weights into a model made by :func:`hlip.create_model`.

    Args:
        model: the model; its parameters are overwritten.
        source: a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, a folder holding one (a local snapshot), or a Hugging
            Face repository id (downloaded, or taken from the local cache). Training checkpoints with ``state_dict`` inside
            and names starting with ``module.`` are fine. Nothing but tensors and plain containers is unpickled.
        strict: raise when names are missing or unexpected, instead of reporting them.

    Returns:
        What was missing, unexpected or resized; also logged as a warning when anything was.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder. ValueError: the file holds no weights for this model,
            a tensor has the wrong shape, or ``strict`` and something does not match.
    """
    path = find_weights(source)
    state = read_state_dict(path)
    own = model.state_dict()
    report = LoadReport(path)
    matched = {}
    for name, value in state.items():
        if name not in own:
            report.unexpected.append(name)
            continue
        expected = own[name].shape
        if value.shape != expected and name.endswith("spatial_posemb") and value.ndim == 5 and value.shape[-1] == expected[-1]:
            value = nn.functional.interpolate(value.float().permute(0, 4, 1, 2, 3), size=expected[1:4], mode="trilinear")
            value = value.permute(0, 2, 3, 4, 1)
            report.resized.append(name)
        if value.shape != expected:
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, the model expects {tuple(expected)}: is this another variant?"
            )
        matched[name] = value
    if not matched:
        raise ValueError(f"{path}: none of its {len(state)} names belong to this model (first: {next(iter(state), '-')!r})")
    report.missing = [name for name in own if name not in matched]
    if strict and not report:
        raise ValueError(f"the checkpoint does not fit the model; {report}")
    model.load_state_dict(matched, strict=False)
    if not report or report.resized:
        log.warning("%s", report)
    return report


def find_weights(source: str | Path) -> Path:
    """The weights file a path, folder or Hugging Face id means."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        found = sorted(p for pattern in ("*.safetensors", "*.pt", "*.pth", "*.bin") for p in path.glob(pattern))
        if len(found) == 1:
            return found[0]
        listing = ", ".join(p.name for p in found) or "no .safetensors, .pt, .pth or .bin file"
        raise FileNotFoundError(f"{path}: expected one of {', '.join(_FILES)} or a single weights file; found {listing}")
    text = str(source)
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path}: no such file or folder (a Hugging Face id looks like 'owner/name')")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    problem: Exception | None = None
    for name in _FILES:
        try:
            return Path(hf_hub_download(text, name))
        except LocalEntryNotFoundError as error:  # offline, and not in the cache
            problem = error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            problem = error
    raise FileNotFoundError(
        f"no weights for {text!r}: not a local path, and not reachable on the Hugging Face hub "
        f"({problem or 'the repository holds none of ' + ', '.join(_FILES)})"
    )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without ``module.`` and with today's names. Never runs code from the file.

    Raises:
        ValueError: not a weights file, or one that would need arbitrary unpickling.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch raise many kinds for a broken or hostile file
            raise ValueError(
                f"{path}: cannot be read safely as weights (tensors in plain containers): {reason(error)}"
            ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
        name = str(name).removeprefix("module.").removeprefix("_orig_mod.")
        name = _RENAMED.get(name, name)
        if name not in _IGNORED:
            tensors[name] = value
    return tensors


def load_mae(trunk: nn.Module, source: str | Path | Mapping[str, Tensor]) -> list[str]:
    """Initialises an encoder from a 2-D MAE ViT (``vit_{base,large}_patch16_224.mae`` of timm), inflated to three dimensions.

    The patch projection is resized in the plane, summed over colours and spread evenly over depth; the class position is
    added to the class token; the 2-D position table gets sines over depth.

    Args:
        trunk: a :class:`hlip.model.encoder.HLIPEncoder` of the same width and depth.
        source: the weights, as a path or a state dict.

    Returns:
        Names of the encoder that the MAE model does not have (they keep their fresh values); a warning says which of them
        it should have.

    Raises:
        ValueError: they are no such weights, or widths differ.
    """
    where = "" if isinstance(source, Mapping) else f"{source}: "
    state = dict(source if isinstance(source, Mapping) else read_state_dict(source))
    config, own = trunk.config, trunk.state_dict()
    lacking = [name for name in ("pos_embed", "cls_token", "patch_embed.proj.weight") if name not in state]
    if not any(name.startswith("blocks.") and name in own for name in state):
        lacking.append("blocks.0.attn.qkv.weight and so on")
    if lacking:
        raise ValueError(
            f"{where}not the weights of a 2-D MAE ViT, which would have {', '.join(lacking)}; "
            f"the first names are {', '.join(list(state)[:3]) or 'none'}"
        )
    table = state.pop("pos_embed")
    if int(table.shape[1] ** 0.5) ** 2 != table.shape[1]:
        state["cls_token"] = state["cls_token"] + table[:, :1]
        table = table[:, 1:]
    weight = state["patch_embed.proj.weight"].float()
    pd, ph, pw = config.patch_size
    if weight.shape[2:] != (ph, pw):
        weight = nn.functional.interpolate(weight, size=(ph, pw), mode="bicubic")
    state["patch_embed.proj.weight"] = weight.sum(1, keepdim=True)[:, :, None].repeat(1, 1, pd, 1, 1) / pd
    state["spatial_posemb"] = inflate_table(table, config.grid)
    matched = {name: value for name, value in state.items() if name in own}
    wrong = [name for name, value in matched.items() if value.shape != own[name].shape]
    if wrong:
        shapes = f"has shape {tuple(matched[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        raise ValueError(f"{where}the MAE weights do not fit this encoder: {wrong[0]} {shapes}")
    trunk.load_state_dict(matched, strict=False)
    missing = [name for name in own if name not in matched]
    expected = [name for name in missing if name.startswith(("blocks.", "norm.", "patch_embed."))]
    if expected:
        log.warning("%sMAE weights lack %d of the encoder's, which start fresh, e.g. %s", where, len(expected), expected[0])
    return missing
