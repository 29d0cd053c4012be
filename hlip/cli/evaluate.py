"""``hlip evaluate``: the zero-shot table of a model on labelled studies."""

from __future__ import annotations

from ..evaluate import benchmark
from ..train.examples import FolderStudies, read_labels
from ..train.inputs import make_datasets
from ..train.published import open_model
from ..train.run import Run
from ..train.validate import Validation, check_labels
from .paths import output_file
from .reading import device_of, reading, workers


def evaluate(args) -> int:
    """Prints the zero-shot table of a run, or a published model, on labelled studies.

    Returns:
        0; 1 if a labelled study of the folder could not be read, and the table is of the others.
    """
    out = output_file(args.scores, "--scores") if args.scores else None
    run = open_model(args.run, model=args.model, device=device_of(args.device))
    if args.studies is None:
        validation = own_validation(run, args)
    elif args.labels and args.prompts:
        validation = labelled_studies(run, args, args.studies, args.labels, args.prompts)
    else:
        raise ValueError("--studies needs --labels (a CSV) and --prompts (a benchmark's name or a YAML file)")
    scores = validation.score(run.model, run.tokenizer, device_of(args.device))
    if out is not None:
        scores.write_csv(out)
    print(scores.metrics().table())
    if out is not None:
        print(f"scores of {len(scores.studies)} studies -> {args.scores}")
    return 0 if len(scores.studies) == len(validation.labelled) else 1


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
    studies = FolderStudies(folder, named=known, need_reports=False, **reading(run, args), **options)
    check_labels(studies, known, chosen, labels)
    return Validation(studies, chosen, known, batch_size=1, workers=workers(run, args))
