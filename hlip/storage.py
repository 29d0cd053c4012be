"""Files that are either whole or not there, and what is said when reading one fails."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Lets ``write`` make a file beside ``path``, then moves it there, so an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        write(partial)
        os.chmod(partial, 0o666 & ~_umask())  # temporary files are private, these are not
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def remove_partial(path: Path) -> None:
    """Removes what earlier processes that were killed left of writing ``path``. None may be writing it now."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Tensors by name, as safetensors, with texts by name."""
    from safetensors.torch import save_file

    data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda partial: save_file(data, partial, dict(metadata or {}) or None))


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
