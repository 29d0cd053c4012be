"""Guess which preset suits a scan or a study."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import SimpleITK as sitk

from .preprocess import PRESETS, Preset
from .study import Scan, Study

_HEAD = "head brain skull cranial cranium cerebral neuro orbit sinus temporal kopf schaedel schädel crane crâne cabeza"
_CHEST = "chest thorax thoracic lung lungs pulmonary heart cardiac coronary mediastinum torax tórax poumon lunge"
_WORDS = {"head": set(_HEAD.split()), "chest": set(_CHEST.split())}
_MRI = set("mr mri t1 t2 t1w t2w t1c t1ce pd flair dwi adc swi swan gre mprage spgr tof dixon stir bold asl".split())
# A head is scanned with a field of view of 200 to 260 mm, a trunk with 300 to 500.
_HEAD_FIELD_MM = 290


class Guess(NamedTuple):
    """A preset's name, and what it was guessed from, for a person to check."""

    preset: str
    reason: str


def auto_preset(what: Study | Scan) -> Guess:
    """Which ragged preset suits: "head-ct", "chest-ct-ragged" or "mri". A guess: show it to the user.

    CT or not comes from the modality; where the format has none, from the name ("T1", "CT") or from values that
    look like Hounsfield units. Head or chest comes from the body part and the descriptions, else from the field of
    view. There is no preset for other parts of the body: they get the chest's. Everything else gets "mri". A study
    gets the preset of most of its scans.
    """
    if isinstance(what, Scan):
        return _of_scan(what)
    guesses = [_of_scan(scan) for scan in what.scans]
    if not guesses:
        return Guess("mri", "there are no scans to guess from")
    votes = Counter(guess.preset for guess in guesses)
    best = votes.most_common(1)[0][0]
    reason = next(guess.reason for guess in guesses if guess.preset == best)
    if len(votes) > 1:
        reason += f" ({votes[best]} of {len(guesses)} scans; others: {', '.join(p for p in votes if p != best)})"
    return Guess(best, reason)


def scan_presets(study: Study, names: Mapping[str, str] | None = None) -> list[Preset]:
    """The guessed preset of each scan of a study.

    Geometry, sizes and type are those of the study's preset. Values are scaled as suits the scan itself: the window of a
    CT would leave nothing of the PET or MR beside it. Which windows a CT gets among others depends on the part of the
    body in its header or name; where only its size could tell, they are those of the study.

    Args:
        names: the name of the preset to take for each guess; None: the guess itself.
    """
    of_study = auto_preset(study).preset
    found = []
    for scan in study.scans:
        own = _of_scan(scan).preset
        if "mri" not in (own, of_study) and not any(_words(scan) & words for words in _WORDS.values()):
            own = of_study
        base, values = (PRESETS[names[name] if names else name] for name in (of_study, own))
        if (base.percentiles, base.windows) != (values.percentiles, values.windows):
            base = replace(
                base,
                name=f"{base.name}, values as for {values.name}",
                percentiles=values.percentiles,
                windows=values.windows,
                thin=max(base.thin, values.thin),  # a head CT among MR keeps its slices
            )
        found.append(base)
    return found


def _words(scan: Scan) -> set[str]:
    return set(re.findall(r"[^\W\d_]+\d?[^\W\d_]*", f"{scan.name} {scan.body_part}".lower()))


def _of_scan(scan: Scan) -> Guess:
    words = _words(scan)
    if scan.modality not in ("CT", ""):
        why = "modality MR" if scan.modality == "MR" else f"there is no preset for modality {scan.modality}"
        return Guess("mri", why)
    kind = "modality CT"
    if not scan.modality:
        if words & _MRI:
            return Guess("mri", f'the name says "{min(words & _MRI)}"')
        if "ct" in words:
            kind = 'the name says "ct"'
        elif _looks_like_hounsfield(scan.image):
            kind = "no modality in the file, but values like Hounsfield units"
        else:
            return Guess("mri", "no modality in the file, and no values like Hounsfield units")
    for part, preset in (("head", "head-ct"), ("chest", "chest-ct-ragged")):
        if words & _WORDS[part]:
            return Guess(preset, f'{kind}; the header or name says "{min(words & _WORDS[part])}"')
    field = max(scan.shape[i] * scan.spacing[i] for i in (1, 2))
    if field <= _HEAD_FIELD_MM:
        return Guess("head-ct", f"{kind}; field of view {field:.0f} mm, the size of a head")
    return Guess("chest-ct-ragged", f"{kind}; field of view {field:.0f} mm, larger than a head")


def _looks_like_hounsfield(image: sitk.Image) -> bool:
    """Air near -1000 and something dense: signed values of the range that CT has."""
    values = sitk.GetArrayViewFromImage(image)
    return -4096 <= float(values.min()) <= -900 and 200 <= float(values.max()) <= 32767
