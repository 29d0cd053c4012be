"""``hlip demo``: learn to find lesions in simulated ragged studies, and show it."""

from __future__ import annotations

import resource
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from .evaluate import zero_shot_classifier
from .explain import occlusion
from .picture import Row, draw_study
from .simulate import SimulatedStudies, simulated_benchmark
from .train.config import config_from, load_config
from .train.loop import train
from .train.run import Run, load_run


def demo(run: str | Path, *, minutes: float | None = None) -> int:
    """Trains, evaluates and draws; returns the exit status.

    Args:
        run: the folder to write.
        minutes: training time; default as in ``demo.yaml``.
    """
    import yaml

    began = time.monotonic()
    values = yaml.safe_load(resources.files(__package__).joinpath("demo.yaml").read_text())
    config = config_from({**values, "run": str(run)}, {} if minutes is None else {"max_minutes": minutes})
    data = config.data
    print(
        f"Training on {data.num_train} simulated studies: {data.min_scans} to {data.max_scans_simulated} scans each, "
        f"{data.min_slices} to {data.max_slices} slices a scan;\n"
        "a bleed, an infarct, a mass or nothing, visible only in some contrasts and a few slices.\n"
        "The only labels are the sentences of the reports.\n",
        flush=True,
    )
    metrics = train(config, overwrite=_is_demo(Path(run)))
    if metrics is None:
        raise ValueError(f"{run} was trained, but could not be evaluated; see the lines above")
    print(f"\nZero-shot on {metrics.num_studies} held-out studies (chance: AUC 0.5, recall {1 / len(metrics.classes):.2f})\n")
    print(metrics.table())
    finished = load_run(run)
    picture, words = draw(finished, Path(run) / "relevance.png")
    print(f"\n{words}\nPicture: {picture}")
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f"Model: {run}   Time: {(time.monotonic() - began) / 60:.1f} min   Peak memory: {memory:.1f} GB", flush=True)
    print(f"\nNext: hlip embed STUDY... --run {run}   |   hlip train --config examples/train.yaml")
    return 0


def _is_demo(folder: Path) -> bool:
    """Whether a folder holds an earlier run on simulated studies, which another demo may replace."""
    file = folder / "config.yaml"
    return file.is_file() and load_config(file).data.train == "simulated"


def draw(run: Run, path: Path, *, candidates: int = 24) -> tuple[Path, str]:
    """One held-out study with the relevance of its finding over its scans, and in words how often relevance hits.

    The study is the first with a finding that the model names rightly and whose most relevant patch is a hit, or else the
    first it names rightly. The words count hits over the first ``candidates`` studies with a finding.
    """
    data = run.config.data
    studies = SimulatedStudies(
        data.num_valid, split="test", seed=run.config.seed, image_size=data.image_size, min_scans=data.min_scans,
        max_scans=data.max_scans_simulated, min_slices=data.min_slices, max_slices=data.max_slices,
    )  # fmt: skip
    classifier = zero_shot_classifier(run.model, run.tokenizer, simulated_benchmark())
    classes = classifier.benchmark.classes
    patch = run.model.config.encoder.patch_size
    chosen, chosen_hit, hits, tried, chance = None, False, 0, 0, []
    for i in range(len(studies)):
        if studies.finding(i) == "normal":
            continue
        study = studies[i]
        target = classes.index(study.finding)
        # What speaks for this finding rather than for the others.
        others = [row for c, row in enumerate(classifier.weights) if c != target]
        maps = occlusion(run.model, study.scans, classifier.weights[target] - torch.stack(others).mean(0))
        hit, share = _hit(maps, study, patch)
        tried, hits, chance = tried + 1, hits + hit, [*chance, share]
        if (chosen is None or (hit and not chosen_hit)) and _answer(run, classifier, study) == study.finding:
            chosen, chosen_hit = (study, maps), hit
        if tried == candidates:
            break
    if chosen is None:
        return path, "The model named no finding rightly; there is nothing to draw."
    _figure(*chosen, path)
    return path, (
        f"The most relevant patch lies on the lesion, in a scan that shows it, in {hits} of {tried} held-out studies "
        f"(chance: {sum(chance) / len(chance):.0%})."
    )


@torch.no_grad()
def _answer(run: Run, classifier, study) -> str:
    from .model import StudyBatch

    features = run.model.encode_image(StudyBatch.pack([study.scans]), normalize=True)
    return classifier.benchmark.classes[int(classifier.cosine(features)[0].argmax())]


def _hit(maps: list[torch.Tensor], study, patch: tuple[int, int, int]) -> tuple[bool, float]:
    """Whether the patch with the highest relevance holds some of the lesion, seen; and the share of patches that do."""
    best = max(range(len(maps)), key=lambda i: float(maps[i].max()) if maps[i].numel() else -1.0)
    peak = np.unravel_index(int(maps[best].argmax()), maps[best].shape)
    hit, touched, total = False, 0, 0
    for i, (mask, visible) in enumerate(zip(study.lesion_masks, study.visible, strict=True)):
        on_lesion = torch.nn.functional.max_pool3d(mask[None].float(), patch, ceil_mode=True)[0] * visible
        touched, total = touched + int(on_lesion.sum()), total + on_lesion.numel()
        if i == best:
            hit = bool(on_lesion[tuple(int(p) // n for p, n in zip(peak, patch, strict=True))])
    return hit, touched / total


def _figure(study, maps: list[torch.Tensor], path: Path) -> None:
    """The relevance over every scan, beside the true outline."""
    rows = [
        Row(name, scan.numpy(), heat.numpy(), mask.numpy())
        for scan, name, heat, mask in zip(study.scans, study.names, maps, study.lesion_masks, strict=True)
    ]
    report = " ".join(study.sentences)
    title = f"Held-out study: {study.finding}\n{report[:230] + ('...' if len(report) > 230 else '')}"
    draw_study(rows, title, path, max_value=255, captions=("relevance for the finding", "the simulated lesion"))
