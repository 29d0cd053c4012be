"""``hlip embed`` and ``hlip evaluate``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..evaluate import benchmark, zero_shot_classifier
from ..train.examples import FolderStudies, read_labels
from ..train.loop import make_datasets
from ..train.run import load_run
from ..train.validate import Validation, embed_studies
from .paths import studies_at


def device_of(name: str) -> str:
    """``"auto"`` is a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def embed(args) -> int:
    """Writes the features of every readable study, and prints scores if prompts are given."""
    run = load_run(args.run, device=device_of(args.device))
    paths, failed = studies_at(args.paths)
    studies = FolderStudies(Path.cwd(), paths=paths, preset=args.preset, need_reports=False)
    names, features = embed_studies(run.model, studies, device_of(args.device), batch_size=1)
    if not names:
        raise ValueError(f"none of the {len(studies)} studies could be read; see the lines above")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, studies=np.array(names), features=features.numpy())
    print(f"{len(names)} of {len(studies)} studies, features {tuple(features.shape)} -> {out}")
    if args.prompts:
        classifier = zero_shot_classifier(run.model, run.tokenizer, benchmark(args.prompts))
        scores = classifier.scores(features.to(device_of(args.device))).cpu()
        width = max(map(len, names))
        print(" " * width + "  " + "  ".join(classifier.benchmark.classes))
        for name, row in zip(names, scores, strict=True):
            cells = (f"{value:>{len(c)}.3f}" for c, value in zip(classifier.benchmark.classes, row, strict=True))
            print(f"{name:{width}}  " + "  ".join(cells))
    return 0 if len(names) == len(studies) and not failed else 1


def evaluate(args) -> int:
    """Prints the zero-shot table of a run on labelled studies."""
    device = device_of(args.device)
    run = load_run(args.run, device=device)
    if args.studies is None:
        _, studies, prompts = make_datasets(run.config)
        validation = Validation.make(studies, prompts, run.config)
        if validation is None:
            raise ValueError(f"{args.run} has no validation studies of its own: give --studies, --labels and --prompts")
        print(validation.run(run.model, run.tokenizer, device).table())
        return 0
    if not (args.labels and args.prompts):
        raise ValueError("--studies needs --labels (a CSV) and --prompts (a benchmark's name or a YAML file)")
    chosen = benchmark(args.prompts)
    validation = Validation(
        FolderStudies(args.studies, preset=args.preset, need_reports=False), chosen, read_labels(args.labels, chosen.classes), 1
    )
    print(validation.run(run.model, run.tokenizer, device).table())
    return 0
