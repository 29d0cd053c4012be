"""What a study is once it has been read: scans with their geometry, and what was left out and why."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import SimpleITK as sitk

NAME_LENGTH = 80


class StudyError(ValueError):
    """Nothing could be read at the given path. ``skipped`` lists what was found there and why it was left out."""

    def __init__(self, message: str, skipped: list[Skipped] | None = None) -> None:
        super().__init__(message)
        self.skipped = list(skipped or [])

    def one_line(self) -> str:
        """What was found, without the path and the advice, for a log of many studies."""
        if not self.skipped:
            return " ".join(str(self).split())
        return "no readable scan; found " + "; ".join(line.strip() for line in summarise(self.skipped, 3).splitlines())


@dataclass(frozen=True)
class Limits:
    """How much of a study is read.

    Attributes:
        min_slices: scans with fewer slices are skipped. The default, 3, keeps the short stacks the published models
            are trained on, and drops single images, scouts and survey pairs: with one or two slices the depth
            direction means nothing. 1 keeps everything.
        max_volumes: of a 4-D scan (diffusion, perfusion, dynamic, multi-echo) the first so many volumes are kept,
            each as a scan of its own. 2 is the published rule: b-volumes 0 and 1.
        max_voxels: a scan that declares more voxels than this is not read (2**30: 1024 slices of 1024 x 1024).
        follow_links: also follow links, to files and to folders, that lead out of the study folder.
    """

    min_slices: int = 3
    max_volumes: int = 2
    max_voxels: int = 2**30
    follow_links: bool = False

    def __post_init__(self) -> None:
        for name in ("min_slices", "max_volumes", "max_voxels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Skipped:
    """Something that was found but not read: where (the first file, if there are several), why, how many files.

    ``broken``: it may be part of a scan, but could not be read; else it is of a kind that is left out.
    """

    path: Path
    reason: str
    files: int = 1
    broken: bool = False

    def __str__(self) -> str:
        more = f" and {self.files - 1} more" if self.files > 1 else ""
        return f"{clean_text(str(self.path), 400)}{more}: {self.reason}"


@dataclass
class Scan:
    """One three-dimensional scan (series, or one volume of it).

    Attributes:
        image: 3-D, scalar, in physical geometry (mm, LPS); CT in Hounsfield units. All values are finite.
        name: series description or file name, cleaned and shortened; not unique, never a key.
        modality: "MR", "CT", "PT", ... as the header says; "" where the format has no such field.
        number: series number, or None.
        files: how many files it was read from.
        notes: what a reader should know: uneven or missing slices, gantry tilt, volumes left out, ...
        body_part: body part, protocol and study description, cleaned; only to guess the anatomy from.
        uid: series instance UID, or the file's path inside the study; with ``volume`` it tells scans apart.
        volume: index among the parts of one series or one 4-D file.
        path: the file it was read from (the first one of a DICOM series).
        slices_known: whether its last axis is known to be that of the slices: it is a DICOM series.
        spacing_in_file: mm between columns, rows and slices as the file has them, where metadata may say otherwise.
    """

    image: sitk.Image
    name: str
    modality: str = ""
    number: int | None = None
    files: int = 1
    notes: list[str] = field(default_factory=list)
    body_part: str = ""
    uid: str = ""
    volume: int = 0
    path: Path | None = None
    slices_known: bool = False
    spacing_in_file: tuple[float, float, float] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(slices, rows, columns)``: the axes of ``SimpleITK.GetArrayFromImage(scan.image)``."""
        return tuple(reversed(self.image.GetSize()))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between slices, rows and columns."""
        return tuple(reversed(self.image.GetSpacing()))

    @property
    def orientation(self) -> str:
        """The direction each axis (columns, rows, slices) grows toward, nearest anatomical letters, such as "LPS"."""
        return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.image.GetDirection())

    def __str__(self) -> str:
        shape = " x ".join(str(n) for n in self.shape)
        spacing = " x ".join(f"{mm:.3g}" for mm in self.spacing)
        notes = "".join(f"\n    note: {note}" for note in self.notes)
        return f"{self.name} ({self.modality or 'modality unknown'}): {shape}, {spacing} mm, {self.orientation}{notes}"


@dataclass
class Study:
    """All scans found under one path, in a fixed order: series number, name, UID."""

    scans: list[Scan]
    skipped: list[Skipped]
    path: Path
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scans)

    def warning(self) -> str:
        """In one line, for a log of many studies: that it may be several studies, or that part of it cannot be read."""
        broken = [item for item in self.skipped if item.broken]
        parts = list(self.notes)
        if broken:
            reasons = "; ".join(line.strip() for line in summarise(broken, 3).splitlines())
            parts.append(f"{count(sum(item.files for item in broken), 'file')} could not be read: {reasons}")
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [f"{clean_text(str(self.path), 400)}: {count(len(self), 'scan')}, {len(self.skipped)} left out"]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  {i}: {scan}" for i, scan in enumerate(self.scans)]
        lines += [f"  skipped: {item}" for item in self.skipped]
        return "\n".join(lines)


def clean_text(value: object, length: int = NAME_LENGTH) -> str:
    """Text from a header or a file name, safe to print: one line, no control, escape or direction characters.

    Letters of any script stay. Bytes of a file name that are not UTF-8 are shown as "\\xe9". Longer text is cut and
    ends in "...".
    """
    text = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", str(value))
    text = unicodedata.normalize("NFC", text)
    # Category C: control, format (bidirectional overrides), surrogate, private use, unassigned.
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    text = re.sub(r" +", " ", text).strip()
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def count(n: int, word: str) -> str:
    """ "1 slice", "2 slices"."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def summarise(skipped: list[Skipped], lines: int = 6) -> str:
    """The commonest reasons, one per line, with the number of files each."""
    counts: Counter[str] = Counter()
    for item in skipped:
        counts[item.reason] += item.files
    rows = [f"  {n} x {reason}" for reason, n in counts.most_common(lines)]
    if len(counts) > lines:
        rows.append(f"  and {count(len(counts) - lines, 'other reason')}")
    return "\n".join(rows)
