"""From a study on disk to scans ready for the model, and a folder that remembers them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..storage import reason, write_tensors

if TYPE_CHECKING:
    from ..data import Prepared


class PreparedStudy(NamedTuple):
    """A study ready for the model.

    Attributes:
        scans: ``(D, H, W)``, of one dtype. max_value: the stored value that means 1.
        warning: see :meth:`hlip.data.Study.warning` and :func:`hlip.data.hounsfield_hint`; empty if there is none.
    """

    scans: list[Tensor]
    max_value: float
    warning: str = ""


def prepare_study(path: Path, preset: str | Mapping[str, str] = "auto", **limits) -> PreparedStudy:
    """Reads one study and prepares its scans; see :func:`prepare_volumes`."""
    volumes, max_value, warning = prepare_volumes(path, preset, **limits)
    return PreparedStudy([volume.voxels for volume in volumes], max_value, warning)


def prepare_volumes(
    path: Path, preset: str | Mapping[str, str] = "auto", **limits
) -> tuple[list[Prepared], float, str]:  # fmt: skip
    """Likewise, with the names of the volumes and where they lie.

    Args:
        path: a folder or a file.
        preset: a name in ``hlip.data.PRESETS``, for all scans; ``"auto"``: what :func:`hlip.data.scan_presets` guesses; a
            mapping: what it gives for the guess.
        limits: of reading, see :class:`hlip.data.Limits`; and ``metadata``, see :func:`hlip.data.read_metadata`.

    Raises:
        ValueError: no such preset; or see :func:`hlip.data.read_study` and :func:`hlip.data.prepare`.
    """
    from ..data import PRESETS, hounsfield_hint, prepare, read_study, scan_presets

    check_preset(preset)
    study = read_study(path, **limits)
    if isinstance(preset, str) and preset != "auto":
        presets = [PRESETS[preset]] * len(study)
    else:
        presets = scan_presets(study, None if preset == "auto" else preset)
    volumes = [p for scan, own in zip(study.scans, presets, strict=True) for p in prepare(scan, own)]
    hints = [hounsfield_hint(scan, own) for scan, own in zip(study.scans, presets, strict=True)]
    return volumes, presets[0].max_value, "; ".join(filter(None, [study.warning(), *hints]))


def check_preset(preset: str | Mapping[str, str]) -> None:
    """Raises ValueError if there is no preset of that name."""
    from ..data import PRESETS

    for name in [preset] if isinstance(preset, str) else preset.values():
        if name != "auto" and name not in PRESETS:
            raise ValueError(f"no preset named {name!r}: choose auto or one of {', '.join(PRESETS)}")


class PreparedCache:
    """Prepared scans by study, in a folder; a study whose files change is prepared anew.

    Args:
        folder: is made when it is needed.
        complain: is told, in one line, what keeps a study from being stored (a full disk); it is given all the same.
    """

    def __init__(self, folder: Path, complain: Callable[[str], None]):
        self.folder, self.complain = folder, complain

    def get(self, path: Path, preset: str | Mapping[str, str], **limits) -> PreparedStudy:
        """As :func:`prepare_study`."""
        stored = self._file(path, preset, limits)
        known = _load(stored)
        if known is not None:
            return known
        study = prepare_study(path, preset, **limits)
        tensors = {f"scan{i:03d}": scan for i, scan in enumerate(study.scans)}
        text = torch.tensor(list(study.warning.encode(errors="replace")), dtype=torch.uint8)
        try:
            write_tensors({**tensors, "max_value": torch.tensor(study.max_value), "warning": text}, stored)
        except Exception as error:  # safetensors has kinds of its own for a full disk
            self.complain(f"{self.folder}: prepared scans cannot be stored ({reason(error)}); they are made anew each time")
        return study

    def has(self, path: Path, preset: str | Mapping[str, str], **limits) -> bool:
        """Whether a study is stored, as its files are now."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(path, preset, limits), framework="pt") as file:  # its size is compared with its header
                return "max_value" in file.keys()  # noqa: SIM118, it is no mapping
        except (OSError, SafetensorError):
            return False

    def remove_stale(self) -> None:
        """Removes what processes that were killed more than a day ago left half written."""
        for partial in self.folder.glob(".*.safetensors.*.partial"):
            with suppress(FileNotFoundError):  # another process has just finished writing it
                if time.time() - partial.stat().st_mtime > 24 * 3600:
                    partial.unlink()

    def _file(self, path: Path, preset: str | Mapping[str, str], limits: Mapping) -> Path:
        return self.folder / f"{_key(path, preset, limits)}.safetensors"


def _key(path: Path, preset: str | Mapping[str, str], limits: Mapping) -> str:
    from ..data.find import list_files

    files = list_files(path, limits.get("follow_links", False))[0] if path.is_dir() else [path]
    stamp = "|".join(f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    limits = dict(limits)
    table = limits.pop("metadata", None) or {}
    known = [(str(p.relative_to(path)), table[p.name]) for p in files if p.name in table]  # only what is said of these files
    kind = preset if isinstance(preset, str) else sorted(preset.items())
    how = (f"{sorted(limits.items())}|" if limits else "") + (f"{known}|" if known else "")
    text = f"2|{how}{kind}|{path.resolve()}|{stamp}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]  # names need not be UTF-8


def _load(stored: Path) -> PreparedStudy | None:
    """What is stored, or ``None``: nothing, or a file that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(stored))
        max_value, warning = float(tensors.pop("max_value")), bytes(tensors.pop("warning").tolist()).decode()
    except (OSError, SafetensorError, KeyError):
        return None
    return PreparedStudy([tensors[name] for name in sorted(tensors)], max_value, warning)
