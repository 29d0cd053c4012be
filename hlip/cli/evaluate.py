"""``hlip evaluate``: the zero-shot table of a model on labelled studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ..evaluate import benchmark
from ..train.examples import FolderStudies, read_labels
from ..train.inputs import make_datasets, own_metadata
from ..train.published import open_model
from ..train.run import Run
from ..train.validate import Scores, Validation, check_labels
from .paths import output_file
from .reading import device_of, reading, workers
from .vectors import fingerprint, read_vectors


def evaluate(args) -> int:
    """Prints the zero-shot table of a run, or a published model, on labelled studies.

    Returns:
        0; 1 if a labelled study of the folder could not be read, and the table is of the others.
    """
    out = output_file(args.scores, "--scores") if args.scores else None
    run = open_model(args.run, model=args.model, device=device_of(args.device))
    if (args.studies or args.features) and not (args.labels and args.prompts):
        given = "--studies" if args.studies else "--features"
        raise ValueError(f"{given} needs --labels (a CSV) and --prompts (a benchmark's name or a YAML file)")
    if args.features:
        if args.studies:
            raise ValueError("--features are of studies that have been read: leave out --studies")
        scores, wanted = stored_scores(run, args)
    else:
        if args.studies:
            validation = labelled_studies(run, args, args.studies, args.labels, args.prompts)
        else:
            validation = own_validation(run, args)
        scores, wanted = validation.score(run.model, run.tokenizer, device_of(args.device)), len(validation.labelled)
    try:
        if out is not None:
            scores.write_csv(out)
    finally:  # a full disk does not take the table away
        print(scores.metrics().table())
    if out is not None:
        print(f"scores of {len(scores.studies)} studies -> {args.scores}")
    return 0 if len(scores.studies) == wanted else 1


def stored_scores(run: Run, args) -> tuple[Scores, int]:
    """Scores of the studies in a file of ``hlip embed`` that a CSV has labels for, and how many those are.

    A name in the CSV is that of a study there, or the end of its path: ``hlip embed`` names them as they were given to it.
    """
    chosen = benchmark(args.prompts)
    known = read_labels(args.labels, chosen.classes)
    names, features = read_vectors(Path(args.features), fingerprint(run.model))
    rows = _rows_of(known, names, args)
    called = dict(zip(rows.values(), rows, strict=True))
    check_labels([called.get(i, name) for i, name in enumerate(names)], args.features, known, chosen, args.labels)
    features = features[list(rows.values())].to(device_of(args.device))
    labels = [known[name] for name in rows]
    return Scores.of(run.model, run.tokenizer, chosen, list(rows), features, labels), len(rows)


def _rows_of(known: Iterable[str], names: Sequence[str], args) -> dict[str, int]:
    """Which of the studies each name in a table means, of those that mean one."""
    by_end: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_end.setdefault(PurePosixPath(name).name, []).append(i)
    rows: dict[str, int] = {}
    called: dict[int, str] = {}
    for name in known:
        ends = by_end.get(PurePosixPath(name).name, [])
        found = [i for i in ends if names[i] == name] or [i for i in ends if names[i].endswith(f"/{name}")]
        if len(found) > 1:
            raise ValueError(
                f"{args.labels}: {name!r} could be {names[found[0]]!r} or {names[found[1]]!r} of {args.features}; name more of "
                "the path"
            )
        for i in found:
            if i in called:
                raise ValueError(f"{args.labels}: {called[i]!r} and {name!r} are the same study of {args.features}; keep one")
            rows[name], called[i] = i, name
    return rows


def own_validation(run: Run, args) -> Validation:
    """The studies that were evaluated on in training, simulated or not, by default with the same labels and prompts."""
    data = run.config.data
    if data.train == "simulated":
        if args.labels or args.prompts or args.preset or args.metadata:
            raise ValueError(
                "simulated studies bring their own --labels, --prompts, --preset and --metadata: those go with --studies"
            )
        _, studies, prompts = make_datasets(run.config)
        validation = Validation.make(studies, prompts, run.config)
        if validation is not None:
            return validation
    elif data.valid:
        labels, prompts = args.labels or data.labels, args.prompts or run.config.prompts
        options = {"cache": data.cache, **({} if args.metadata else own_metadata(data))}
        return labelled_studies(run, args, data.valid, labels, prompts, **options)
    raise ValueError(f"{args.run} has no validation studies of its own: give --studies, --labels and --prompts")


def labelled_studies(run: Run, args, folder: str, labels: str, prompts: str, **options) -> Validation:
    """The studies in a folder that a CSV has labels for."""
    chosen = benchmark(prompts)
    known = read_labels(labels, chosen.classes)
    studies = FolderStudies(folder, named=known, need_reports=False, **reading(run, args), **options)
    check_labels(studies.names, folder, known, chosen, labels)
    return Validation(studies, chosen, known, batch_size=1, workers=workers(run, args))
