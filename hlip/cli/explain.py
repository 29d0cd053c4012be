"""``hlip explain``: which places of a study speak for a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from ..data.metadata import tell_missing
from ..data.placement import image_of
from ..evaluate import Benchmark, benchmark, zero_shot_classifier
from ..evaluate.prompts import parse
from ..explain import occlusion, relevance
from ..model import StudyBatch
from ..picture import Row, draw_study
from ..storage import reason, write_atomically
from ..train.prepared import prepare_volumes
from ..train.published import open_model
from ..train.run import Run
from .paths import output_folder
from .reading import device_of, reading

METHODS = {"gradient": relevance, "occlusion": occlusion}
_MOST_ROWS = 12  # of the picture


def explain(args) -> int:
    """Writes a map for every volume that the model is shown, to be laid over the scans, and a picture of the strongest."""
    out = args.out or str(Path("explained", Path(args.study).resolve().name))
    folder = output_folder(out, "--out")
    chosen, target = what_is_asked(args)
    run = open_model(args.run, model=args.model, device=device_of(args.device))
    if chosen is None:
        chosen = parse("text", {"classes": {args.text: args.text.rstrip(".")}, "templates": [run.config.prompt + "{c}."]})
    options = reading(run, args)
    if "metadata" in options:
        tell_missing(options["metadata"], [Path(args.study)], args.follow_links)
    volumes, max_value, warning = prepare_volumes(Path(args.study), **options)
    if warning:
        print(warning)
    direction, what = direction_of(run, chosen, target)
    scans = [volume.voxels for volume in volumes]
    with torch.no_grad():
        features = run.model.encode_image(StudyBatch.pack([scans], max_value=max_value).to(direction.device), normalize=True)
    cosine = float(torch.nn.functional.cosine_similarity(features.flatten(0, -2)[0], direction, dim=0))
    maps = METHODS[args.method](run.model, scans, direction, max_value=max_value)
    print(f"{what}: cosine {cosine:.3f}" + ", and no place that speaks for it" * (not any(heat.any() for heat in maps)))
    order = sorted(range(len(maps)), key=lambda i: -float(maps[i].max()))
    width = max(len(volume.name) for volume in volumes)
    print(f"{'':{width}}  relevance  at slice")
    files = []
    for i, (volume, heat) in enumerate(zip(volumes, maps, strict=True), start=1):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", volume.name).strip("-.")[:60]
        files.append(folder / f"{i:02d}{'-' * bool(name)}{name}.nii.gz")
        image = image_of(heat.numpy(), volume.affine)
        write_atomically(files[-1], lambda partial, image=image: _write(image, partial))
    for i in order:
        peak = np.unravel_index(int(maps[i].argmax()), maps[i].shape)
        print(f"{volumes[i].name:{width}}  {float(maps[i].max()):9.2f}  {peak[0] + 1} of {len(maps[i])}")
    rows = [
        Row(volumes[i].name, scans[i].numpy(), maps[i].numpy(), aspect=volumes[i].spacing[1] / volumes[i].spacing[2])
        for i in order[:_MOST_ROWS]
    ]
    draw_study(rows, f"{what} (cosine {cosine:.3f})", folder / "relevance.png", max_value=max_value, captions=("relevance",))
    print(f"{len(files)} maps and relevance.png -> {out}")
    return 0


def what_is_asked(args) -> tuple[Benchmark | None, str]:
    """The prompts and the class in them, or ``None`` and the text itself.

    Raises:
        ValueError: neither, both, or a class that the prompts do not have.
    """
    if bool(args.text) == bool(args.prompts) or (args.text and args.target):
        raise ValueError("give either --text, or --prompts with --class")
    if args.text:
        return None, args.text
    chosen = benchmark(args.prompts)
    if args.target not in chosen.classes:
        raise ValueError(f"--class: {args.target!r} is none of {args.prompts}: {', '.join(chosen.classes)}")
    return chosen, args.target


def direction_of(run: Run, chosen: Benchmark, target: str) -> tuple[torch.Tensor, str]:
    """The text feature ``(D,)`` that a study is compared with, and what it is called.

    Of classes that compete, what speaks for this one rather than for the others; likewise against its denial.
    """
    classifier = zero_shot_classifier(run.model, run.tokenizer, chosen)
    place = chosen.classes.index(target)
    own = classifier.weights[place]
    if classifier.against is not None:
        return own - classifier.against[place], f"{target} rather than not"
    if chosen.kind == "multiclass" and len(chosen.classes) > 1:
        others = [row for i, row in enumerate(classifier.weights) if i != place]
        return own - torch.stack(others).mean(0), f"{target} rather than the other classes"
    return own, target


def _write(image: sitk.Image, partial: str) -> None:
    """As compressed NIfTI, which SimpleITK tells by the name."""
    named = Path(f"{partial}.nii.gz")
    try:
        sitk.WriteImage(image, str(named))
        named.replace(partial)
    except RuntimeError as error:  # SimpleITK's, of every kind
        raise OSError(f"{named}: cannot be written ({reason(error)})") from error
    finally:
        named.unlink(missing_ok=True)
