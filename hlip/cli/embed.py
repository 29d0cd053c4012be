"""``hlip embed``: studies as vectors."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import Subset

from ..evaluate import Benchmark, benchmark, zero_shot_classifier
from ..train.examples import FolderStudies
from ..train.processes import Stopped, stop_signals
from ..train.published import open_model
from ..train.run import Run
from ..train.validate import embedded
from .paths import output_file, studies_at
from .reading import device_of, reading, workers
from .vectors import Vectors, fingerprint


def embed(args) -> int:
    """Writes the features of every readable study, and prints scores if prompts are given.

    Returns:
        0; 1 if a study could not be read, or a path holds none.

    Raises:
        Stopped: by a signal; the features so far are kept, for ``--resume``.
    """
    device = device_of(args.device)
    out = output_file(args.out, "--out")
    chosen = benchmark(args.prompts) if args.prompts else None
    run = open_model(args.run, model=args.model, device=device)
    paths, failed = studies_at(args.paths, args.follow_links)
    options = reading(run, args)
    studies = FolderStudies(Path.cwd(), paths=paths, need_reports=False, **options)
    vectors = Vectors(out, fingerprint(run.model), options)
    before = vectors.resume(studies.names) if args.resume else vectors.check_nothing_is_lost()
    _embed_rest(run, studies, vectors, device, workers(run, args))
    if not vectors.names:
        raise ValueError(f"none of the {len(studies)} studies could be read; see the lines above")
    names, features = vectors.finish(studies.names)
    told = f", {before} of them before" if before else ""
    print(f"{len(names)} of {len(studies)} studies{told}, features {tuple(features.shape)} -> {args.out}")
    if chosen is not None:
        print_scores(run, chosen, names, features.to(device))
    return 0 if len(names) == len(studies) and not failed else 1


def _embed_rest(run: Run, studies: FolderStudies, vectors: Vectors, device: str, num_workers: int) -> None:
    """Embeds the studies that ``vectors`` has not. What ends it early leaves those so far in a file, and says so."""
    done = set(vectors.names)
    rest = [i for i, name in enumerate(studies.names) if name not in done]
    ahead = min(num_workers, max(len(rest) - 1, 0))  # none for a single study
    with stop_signals() as came:  # until all is saved, which a second signal does not end
        try:
            for names, features in embedded(run.model, Subset(studies, rest), device, batch_size=1, workers=ahead):
                if names:
                    vectors.add(names, features)
                if came:
                    raise Stopped("", came[0])
        except BaseException as error:
            if not vectors.keep():
                raise
            kept = f"{len(vectors.names)} of {len(studies)} studies are kept in {vectors.kept_in}; --resume goes on from there"
            if isinstance(error, KeyboardInterrupt):
                number = error.status - 128 if isinstance(error, Stopped) else signal.SIGINT
                raise Stopped(f"stopped by {signal.Signals(number).name}: {kept}", number) from None
            print(kept, file=sys.stderr)
            raise


def print_scores(run: Run, chosen: Benchmark, names: list[str], features: torch.Tensor) -> None:
    """One study a line, one column a class."""
    classifier = zero_shot_classifier(run.model, run.tokenizer, chosen)
    width = max(map(len, names))
    print(" " * width + "  " + "  ".join(chosen.classes))
    for name, row in zip(names, classifier.scores(features), strict=True):
        cells = (f"{value:>{len(c)}.3f}" for c, value in zip(chosen.classes, row, strict=True))
        print(f"{name:{width}}  " + "  ".join(cells))
