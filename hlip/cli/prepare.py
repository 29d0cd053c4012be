"""``hlip prepare``: fills the cache of a training config, so that training only reads what is ready."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, Subset

from ..progress import progress_bar
from ..storage import reason
from ..train import load_config
from ..train.examples import FolderStudies
from ..train.inputs import make_datasets


def prepare(args, overrides: Mapping) -> int:
    """Reads every study that training or its evaluation would, and stores its scans as the model takes them.

    What is stored already stays, so an interrupted call is gone on with by the next.

    Returns:
        0; 1 if a study could not be read or stored.

    Raises:
        FileNotFoundError, ValueError: the config cannot be used, or nothing can be stored in its cache.
    """
    config = load_config(args.config, overrides)
    config.validate()
    if config.data.train == "simulated":
        raise ValueError("data.train: simulated studies are not read, and need no preparing")
    if not config.data.cache:
        raise ValueError("data.cache: name the folder that prepared scans are kept in (--set data.cache=FOLDER)")
    train, valid, prompts = make_datasets(config)
    _check_folder(train.cache.folder)
    train.cache.remove_stale()
    failed = _fill(train, list(range(len(train))), args)
    if valid is not None:
        labelled = [i for i, name in enumerate(valid.names) if name in prompts[1]]
        failed += _fill(valid, labelled, args)
    return 1 if failed else 0


def _check_folder(folder: Path) -> None:
    """Raises ValueError if nothing can be stored in a folder, which is better known before hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache: prepared scans cannot be stored in {folder} ({reason(error)})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"data.cache: no permission to write in {folder}")


def _fill(studies: FolderStudies, indices: list[int], args) -> int:
    """Prepares the studies of these indices, or this call's part of them; returns how many could not be."""
    part, parts = args.part
    indices = indices[part - 1 :: parts]
    loader = DataLoader(Subset(_Stored(studies), indices), batch_size=None, num_workers=min(args.workers, len(indices)))
    found = {"new": 0, "before": 0, "failed": 0}
    bar = progress_bar(total=len(indices), unit="study")
    try:
        for outcome in loader:
            found[outcome] += 1
            bar.update(1)
    finally:
        bar.close()
    of = f" (part {part} of {parts})" if parts > 1 else ""
    print(
        f"{studies.folder}: {len(indices)} studies{of}: {found['new']} prepared, {found['before']} were before, "
        f"{found['failed']} could not be -> {studies.cache.folder}"
    )
    return found["failed"]


class _Stored(Dataset):
    """What becomes of each study in the cache."""

    def __init__(self, studies: FolderStudies):
        self.studies = studies

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> str:
        if self.studies.is_stored(index):
            return "before"
        self.studies[index]  # says what is wrong
        return "new" if self.studies.is_stored(index) else "failed"
