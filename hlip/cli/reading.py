"""What several commands ask of a model and of studies: the device, how scans are prepared, how many processes read."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ..data import read_metadata
from ..train.inputs import how_to_read
from ..train.published import PublishedModel
from ..train.run import Run

log = logging.getLogger(__name__)


def device_of(name: str) -> str:
    """``"auto"`` is a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def reading(run: Run, args) -> dict:
    """How studies are read and prepared: as the model was trained (see :class:`FolderStudies`), unless asked otherwise.

    A table of metadata is one of certain files, and so not taken over from training.
    """
    data = run.config.data
    if isinstance(run, PublishedModel):
        options = {"preset": run.preset}
    elif data.train == "simulated":
        options = {"preset": data.preset}
    else:
        options = {name: value for name, value in how_to_read(data).items() if name != "cache"}
    trained = options["preset"]
    if args.preset and args.preset != trained and data.train != "simulated":
        usual = ", ".join(dict.fromkeys(trained.values())) if isinstance(trained, Mapping) else trained
        log.warning("--preset %s: the model was trained on scans prepared otherwise (%s)", args.preset, usual)
    if args.metadata:
        options["metadata"] = read_metadata(args.metadata)
    if args.follow_links:
        options["follow_links"] = True
    return {**options, "preset": args.preset or trained}


def workers(run: Run, args) -> int:
    """How many processes read studies ahead: as many as were asked for, or as in training."""
    return run.config.data.workers if args.workers is None else args.workers
