"""``hlip embed`` and ``hlip evaluate``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..evaluate import benchmark, zero_shot_classifier
from ..storage import write_atomically
from ..train.examples import FolderStudies, read_labels
from ..train.inputs import how_to_read, make_datasets
from ..train.published import PublishedModel, open_model
from ..train.run import Run
from ..train.validate import Validation, check_labels, embed_studies
from .paths import studies_at

log = logging.getLogger(__name__)


def device_of(name: str) -> str:
    """``"auto"`` is a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def embed(args) -> int:
    """Writes the features of every readable study, and prints scores if prompts are given.

    Returns:
        0; 1 if a study could not be read, or a path holds none.
    """
    device = device_of(args.device)
    out = output_file(args.out)
    chosen = benchmark(args.prompts) if args.prompts else None
    run = open_model(args.run, model=args.model, device=device)
    paths, failed = studies_at(args.paths, args.follow_links)
    studies = FolderStudies(Path.cwd(), paths=paths, need_reports=False, **reading(run, args))
    names, features = embed_studies(run.model, studies, device, batch_size=1)
    if not names:
        raise ValueError(f"none of the {len(studies)} studies could be read; see the lines above")
    write_atomically(out, lambda partial: _save(partial, studies=np.array(names), features=features.numpy()))
    print(f"{len(names)} of {len(studies)} studies, features {tuple(features.shape)} -> {args.out}")
    if chosen is not None:
        classifier = zero_shot_classifier(run.model, run.tokenizer, chosen)
        scores = classifier.scores(features.to(device)).cpu()
        width = max(map(len, names))
        print(" " * width + "  " + "  ".join(classifier.benchmark.classes))
        for name, row in zip(names, scores, strict=True):
            cells = (f"{value:>{len(c)}.3f}" for c, value in zip(classifier.benchmark.classes, row, strict=True))
            print(f"{name:{width}}  " + "  ".join(cells))
    return 0 if len(names) == len(studies) and not failed else 1


def output_file(name: str) -> Path:
    """The file to write, as it is named; a link's target.

    Raises:
        ValueError: it could not be written, which is better known before hours of work.
    """
    path = Path(name).expanduser().resolve()
    there = next(place for place in (path, *path.parents) if place.exists())
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise ValueError(f"--out: {path} is not a plain file, and cannot be replaced by one")
    if there != path and not there.is_dir():
        raise ValueError(f"--out: {there} is a file, expected a folder to write in")
    folder = path.parent if there == path else there
    if not os.access(there, os.W_OK) or not os.access(folder, os.W_OK):
        raise ValueError(f"--out: no permission to write {path}")
    return path


def _save(path: str, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:  # by name, numpy would add .npz
        np.savez(file, **arrays)


def evaluate(args) -> int:
    """Prints the zero-shot table of a run, or a published model, on labelled studies.

    Returns:
        0; 1 if a labelled study of the folder could not be read, and the table is of the others.
    """
    run = open_model(args.run, model=args.model, device=device_of(args.device))
    if args.studies is None:
        validation = own_validation(run, args)
    elif args.labels and args.prompts:
        validation = labelled_studies(run, args, args.studies, args.labels, args.prompts)
    else:
        raise ValueError("--studies needs --labels (a CSV) and --prompts (a benchmark's name or a YAML file)")
    metrics = validation.run(run.model, run.tokenizer, device_of(args.device))
    print(metrics.table())
    return 0 if metrics.num_studies == len(validation.labelled) else 1


def own_validation(run: Run, args) -> Validation:
    """The studies that were evaluated on in training, simulated or not, by default with the same labels and prompts."""
    data = run.config.data
    if data.train == "simulated":
        if args.labels or args.prompts or args.preset:
            raise ValueError("--labels, --prompts and --preset go with --studies: simulated studies bring their own")
        _, studies, prompts = make_datasets(run.config)
        validation = Validation.make(studies, prompts, run.config)
        if validation is not None:
            return validation
    elif data.valid:
        labels, prompts = args.labels or data.labels, args.prompts or run.config.prompts
        return labelled_studies(run, args, data.valid, labels, prompts, cache=data.cache)
    raise ValueError(f"{args.run} has no validation studies of its own: give --studies, --labels and --prompts")


def labelled_studies(run: Run, args, folder: str, labels: str, prompts: str, **options) -> Validation:
    """The studies in a folder that a CSV has labels for."""
    chosen = benchmark(prompts)
    known = read_labels(labels, chosen.classes)
    studies = FolderStudies(folder, need_reports=False, **reading(run, args), **options)
    check_labels(studies, known, chosen, labels)
    return Validation(studies, chosen, known, batch_size=1)


def reading(run: Run, args) -> dict:
    """How studies are read and prepared: as the model was trained (see :class:`FolderStudies`), unless asked otherwise."""
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
    if args.follow_links:
        options["follow_links"] = True
    return {**options, "preset": args.preset or trained}
