"""What a radiologist would write: sentences on the finding, on what is absent, on what does not matter."""

from __future__ import annotations

import numpy as np

from ..evaluate import Benchmark
from ..evaluate.prompts import parse

CLASSES = ("normal", "hemorrhage", "infarct", "mass")

_PLACE = {
    "frontal": ("{side} frontal lobe", "{side} frontal white matter"),
    "parietal": ("{side} parietal lobe", "{side} parietal region"),
    "temporal": ("{side} temporal lobe", "{side} temporal region"),
    "occipital": ("{side} occipital lobe", "{side} occipital region"),
    "deep": ("{side} basal ganglia", "{side} thalamus and deep white matter"),
}
_FINDING = {
    "hemorrhage": (
        "There is an acute intraparenchymal hemorrhage in the {place}.",
        "A hematoma is seen in the {place} with mild surrounding edema.",
        "Acute hemorrhage in the {place}.",
        "Findings are consistent with an intracranial hemorrhage of the {place}.",
        "New parenchymal bleed, {place}.",
        "Intracranial hematoma centered in the {place}.",
    ),
    "infarct": (
        "There is an acute infarct in the {place}.",
        "Restricted diffusion in the {place}, compatible with acute ischemic stroke.",
        "Acute ischemia of the {place}.",
        "Findings are consistent with an acute infarct of the {place}.",
        "Recent ischemic infarction, {place}.",
        "An acute stroke involves the {place}.",
    ),
    "mass": (
        "There is a mass in the {place} with surrounding edema.",
        "An intracranial tumor is seen in the {place}.",
        "A rim forming lesion in the {place}, suspicious for a neoplasm.",
        "Findings are consistent with a brain tumor of the {place}.",
        "Space occupying lesion, {place}.",
        "Intracranial mass centered in the {place}, with vasogenic edema.",
    ),
    "normal": (
        "No acute intracranial abnormality.",
        "Unremarkable study of the brain.",
        "The brain is normal for age.",
        "There is no acute abnormality.",
        "No significant intracranial abnormality is seen.",
        "Normal examination.",
    ),
}
_ABSENT = {
    "hemorrhage": ("No intracranial hemorrhage.", "There is no hemorrhage.", "No evidence of bleeding."),
    "infarct": ("No acute infarct is seen.", "There is no evidence of acute ischemia.", "No acute stroke."),
    "mass": ("No mass is seen.", "There is no intracranial tumor.", "No space occupying lesion."),
}
_IRRELEVANT = (
    "Mild mucosal thickening of the maxillary sinus.",
    "The orbits are unremarkable.",
    "The mastoid air cells are clear.",
    "The major vessels show normal flow.",
    "Midline structures are in place.",
    "The pituitary gland is of normal size.",
    "No prior study for comparison.",
    "Clinical correlation is recommended.",
)
_SPOTS = (
    "Scattered white matter changes, likely chronic small vessel disease.",
    "Few nonspecific white matter foci.",
    "Chronic microvascular changes.",
)
_ATROPHY = ("Mild generalized volume loss.", "Prominent sulci and ventricles for age.", "Cerebral atrophy.")
_MOTION = ("The examination is limited by motion.", "Mild motion artifact.")


def write_report(
    finding: str, side: str, lobe: str, rng: np.random.Generator, *, spots: int = 0, atrophy: bool = False, motion: bool = False
) -> list[str]:
    """Sentences of one report, shuffled: two or three on the finding, at times one on what is absent,
    some beside the point."""
    place = _choose(_PLACE[lobe], rng).format(side=side) if finding != "normal" else ""
    about = rng.permutation(len(_FINDING[finding]))[: rng.integers(2, 4)]
    sentences = [_FINDING[finding][i].format(place=place) for i in about]
    absent = [kind for kind in _ABSENT if kind != finding]
    for kind in rng.permutation(absent)[: rng.integers(0, 2)]:
        sentences.append(_choose(_ABSENT[str(kind)], rng))
    for present, phrases in ((spots > 0, _SPOTS), (atrophy, _ATROPHY), (motion, _MOTION)):
        if present and rng.random() < 0.6:
            sentences.append(_choose(phrases, rng))
    if rng.random() < 0.5:
        sentences.append(_choose(_IRRELEVANT, rng))
    return [sentences[i] for i in rng.permutation(len(sentences))]


def _choose(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrases[rng.integers(len(phrases))]


def simulated_benchmark() -> Benchmark:
    """The zero-shot classes of simulated studies; exactly one is right for each."""
    return parse(
        "simulated",
        {
            "kind": "multiclass",
            "templates": ["This study shows: {c}.", "This study shows: There is {c}.", "This study shows: Findings of {c}."],
            "plain": ["normal"],
            "classes": {
                "normal": ["No acute intracranial abnormality", "Normal brain"],
                "hemorrhage": ["an acute intracranial hemorrhage", "a hematoma"],
                "infarct": ["an acute infarct", "an acute ischemic stroke"],
                "mass": ["an intracranial mass", "a brain tumor"],
            },
        },
    )
