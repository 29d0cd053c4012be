"""Draws and renders whole simulated studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..progress import progress_bar
from . import anatomy
from .contrast import LESION_SIGNAL, PROTOCOLS, SIGNAL, SPOT_SIGNAL, render, visible_in
from .lesion import Lesion, draw_lesion
from .report import CLASSES, write_report

_SPLITS = ("train", "test")
_CENTRE = np.array([0.0, -18.0, 10.0])  # of the head, mm
_FIELD = 192.0  # field of view, mm
# Depth, rows, columns of each plane as axes of (right, anterior, superior), with the sense in which they grow: right,
# posterior, inferior, the axes that the published preparation turns every scan to.
PLANES = {
    "axial": ((2, -1), (1, -1), (0, 1)),
    "coronal": ((1, -1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, -1)),
}
_EXTENT = {"axial": 118.0, "coronal": 150.0, "sagittal": 116.0}  # mm of brain along depth


@dataclass(frozen=True)
class ScanPlan:
    """One scan before it is rendered: contrast, plane, number of slices, and the distance between them in mm."""

    contrast: str
    plane: str
    slices: int
    spacing: float

    @property
    def name(self) -> str:
        return f"{self.plane} {self.contrast}"


@dataclass(frozen=True)
class StudyPlan:
    """Everything about a study but its voxels; cheap to draw."""

    finding: str
    lesion: Lesion | None
    scans: tuple[ScanPlan, ...]
    sentences: tuple[str, ...]
    spots: np.ndarray
    atrophy: bool
    motion: int  # the scan with motion, or -1
    pose: np.ndarray  # (3, 4): scanner mm -> MNI mm


@dataclass
class SimulatedStudy:
    """A rendered study.

    Attributes:
        scans: uint8 ``(D, H, W)``, each with its own D. names: e.g. ``"axial FLAIR"``. spacings: mm ``(d, h, w)``.
        sentences: its report. finding: one of :data:`CLASSES`.
        lesion_masks: bool ``(D, H, W)``: where the lesion lies in each scan, seen or not. visible: whether the scan's
            contrast shows it.
    """

    scans: list[Tensor]
    names: list[str]
    spacings: list[tuple[float, float, float]]
    sentences: list[str]
    finding: str
    lesion_masks: list[Tensor] = field(default_factory=list)
    visible: list[bool] = field(default_factory=list)

    def clone(self) -> SimulatedStudy:
        """A copy with tensors of its own."""
        return replace(self, scans=[s.clone() for s in self.scans], lesion_masks=[m.clone() for m in self.lesion_masks])


class SimulatedStudies(torch.utils.data.Dataset):
    """Simulated studies by number; study ``i`` depends on (seed, split, i) alone, on any process and machine.

    Args:
        num_studies: how many.
        split: ``"train"`` or ``"test"``: disjoint streams of random numbers.
        seed: of both streams.
        image_size: rows and columns.
        min_scans, max_scans, min_slices, max_slices: inclusive bounds.
        findings: the classes to draw from, equally often.
        cache: keep rendered studies in memory (of each process), about 0.8 MB each at the default sizes.

    Raises:
        ValueError: an unknown split or finding, or bounds that make no sense.
    """

    def __init__(
        self, num_studies: int, *, split: str = "train", seed: int = 0, image_size: int = 96, min_scans: int = 2,
        max_scans: int = 5, min_slices: int = 6, max_slices: int = 20, findings: Sequence[str] = CLASSES,
        cache: bool = False,
    ):  # fmt: skip
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {_SPLITS}, got {split!r}")
        if (
            not (2 <= min_scans <= max_scans and max_scans >= 3)
            or not 1 <= min_slices <= max_slices
            or num_studies < 0
            or image_size < 16
        ):
            raise ValueError(
                "expected num_studies >= 0, image_size >= 16, 2 <= min_scans <= max_scans >= 3, "
                "1 <= min_slices <= max_slices; got "
                f"{num_studies}, {image_size}, {min_scans} to {max_scans} scans, {min_slices} to {max_slices} slices"
            )
        unknown = set(findings) - set(CLASSES)
        if unknown or not findings:
            raise ValueError(f"findings must be among {CLASSES}, got {tuple(findings)}")
        self.num_studies, self.split, self.seed, self.image_size = num_studies, split, seed, image_size
        self.bounds = min_scans, max_scans, min_slices, max_slices
        self.findings = tuple(findings)
        self._cache: dict[int, SimulatedStudy] | None = {} if cache else None

    def __len__(self) -> int:
        return self.num_studies

    def finding(self, index: int) -> str:
        """The class of a study, without rendering it."""
        return self.findings[self._rng(index).integers(len(self.findings))]

    def all_sentences(self, limit: int | None = None) -> list[str]:
        """The sentences of the first ``limit`` reports, without rendering."""
        return [s for i in range(min(len(self), limit or len(self))) for s in self.plan(i).sentences]

    def _rng(self, index: int, part: int = 0) -> np.random.Generator:
        if not 0 <= index < self.num_studies:
            raise IndexError(f"study {index} of {self.num_studies}")
        return np.random.Generator(np.random.PCG64([self.seed, _SPLITS.index(self.split), index, part]))

    def plan(self, index: int) -> StudyPlan:
        """Draws a study: everything but its voxels."""
        rng = self._rng(index)
        finding = self.findings[rng.integers(len(self.findings))]
        scans = self._protocol(rng)
        pose = _draw_pose(rng)
        lesion = None
        if finding != "normal":
            lesion = _shown(draw_lesion(finding, rng, anatomy.white_matter_points()), scans, pose)
        places = anatomy.white_matter_points()
        spots = places[rng.integers(len(places), size=rng.integers(2, 9) if rng.random() < 0.4 else 0)]
        atrophy = rng.random() < 0.2
        motion = int(rng.integers(len(scans))) if rng.random() < 0.15 else -1
        sentences = write_report(
            finding, lesion.side if lesion else "", lesion.lobe if lesion else "", rng,
            spots=len(spots), atrophy=atrophy, motion=motion >= 0,
        )  # fmt: skip
        return StudyPlan(finding, lesion, scans, tuple(sentences), spots, atrophy, motion, pose)

    def _protocol(self, rng: np.random.Generator) -> tuple[ScanPlan, ...]:
        min_scans, max_scans, min_slices, max_slices = self.bounds
        contrasts = list(PROTOCOLS[rng.integers(len(PROTOCOLS))])
        names = list(SIGNAL)
        while len(contrasts) < min_scans or (len(contrasts) < max_scans and rng.random() < 0.6):
            contrasts.append(names[rng.integers(len(names))])
        scans = []
        for i in rng.permutation(len(contrasts)):
            plane = ("axial", "axial", "coronal", "sagittal")[rng.integers(4)]
            slices = int(rng.integers(min_slices, max_slices + 1))
            scans.append(ScanPlan(contrasts[i], plane, slices, _EXTENT[plane] / slices))
        return tuple(scans)

    def __getitem__(self, index: int) -> SimulatedStudy:
        if self._cache is None:
            return self._render(index)
        if index not in self._cache:
            self._cache[index] = self._render(index)
        return self._cache[index]

    def render_all(self, processes: int = 0, *, progress: bool = False) -> None:
        """Renders every study into the cache, in ``processes`` processes beside this one (0: in this one)."""
        self._cache = None  # workers get a copy of this object: without what is rendered already
        loader = torch.utils.data.DataLoader(self, batch_size=None, num_workers=min(processes, len(self)), collate_fn=_as_is)
        bar = progress_bar(loader, total=len(self), unit="study", desc=f"rendering ({self.split})", disable=not progress)
        # A copy in plain memory: what comes from a worker holds a file handle for each tensor.
        self._cache = {i: study.clone() if processes else study for i, study in enumerate(bar)}

    def _render(self, index: int) -> SimulatedStudy:
        plan, rng = self.plan(index), self._rng(index, 1)
        study = SimulatedStudy([], [], [], list(plan.sentences), plan.finding)
        pixel = _FIELD / self.image_size
        for number, scan in enumerate(plan.scans):
            voxels, mask = render_scan(plan, scan, self.image_size, rng, moved=number == plan.motion)
            study.scans.append(voxels)
            study.names.append(scan.name)
            study.spacings.append((scan.spacing, pixel, pixel))
            study.lesion_masks.append(mask)
            study.visible.append(scan.contrast in visible_in(plan.finding) and bool(mask.any()))
        return study


def _as_is(study: SimulatedStudy) -> SimulatedStudy:
    return study


def render_scan(
    plan: StudyPlan, scan: ScanPlan, size: int, rng: np.random.Generator, *, moved: bool = False, artefacts: bool = True
) -> tuple[Tensor, Tensor]:
    """Voxels uint8 ``(D, H, W)`` of one scan, and where the lesion lies in it (bool)."""
    points = _points(plan, scan, size)
    tissues = anatomy.sample(torch.from_numpy(points)).numpy()
    if plan.atrophy:  # fluid gains on the tissue beside it
        gain = np.minimum(tissues[2] * 0.9, tissues[0] + tissues[1])
        share = gain / np.maximum(tissues[0] + tissues[1], 1e-6)
        tissues[0] -= tissues[0] * share
        tissues[1] -= tissues[1] * share
        tissues[2] += gain
    signal = render(scan.contrast, tissues)
    brain = np.clip(tissues[:3].sum(0), 0, 1)
    _add_spots(signal, points, plan.spots, scan.contrast, tissues[1])
    mask = np.zeros(signal.shape, dtype=bool)
    if plan.lesion is not None:
        _add_lesion(signal, mask, points, plan.lesion, scan.contrast, brain)
    if artefacts:
        signal = _degrade(signal, scan.contrast, rng, moved)
    # A fixed window, not the picture's own percentiles: those would let a bright lesion dim everything around it.
    signal = np.clip(signal, 0, 1)
    return torch.from_numpy((signal * 255).astype(np.uint8)), torch.from_numpy(mask)


def _points(plan: StudyPlan, scan: ScanPlan, size: int) -> np.ndarray:
    """Position of every voxel in MNI space, float32 ``(D, H, W, 3)`` mm."""
    pixel = _FIELD / size
    ticks = [
        (np.arange(scan.slices) - (scan.slices - 1) / 2) * scan.spacing,
        (np.arange(size) - (size - 1) / 2) * pixel,
        (np.arange(size) - (size - 1) / 2) * pixel,
    ]
    local = np.zeros((scan.slices, size, size, 3), dtype=np.float32)
    for array_axis, ((axis, sense), values) in enumerate(zip(PLANES[scan.plane], ticks, strict=True)):
        shape = [1, 1, 1]
        shape[array_axis] = -1
        local[..., axis] = (sense * values).reshape(shape)
    return local @ plan.pose[:, :3].T.astype(np.float32) + plan.pose[:, 3].astype(np.float32)


def _draw_pose(rng: np.random.Generator) -> np.ndarray:
    """A head of its own size, a little turned and shifted: ``(3, 4)``, scanner mm -> MNI mm."""
    angles = rng.normal(0, np.deg2rad(3), 3)
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        i, j = [a for a in range(3) if a != axis]
        step = np.eye(3)
        step[i, i], step[i, j], step[j, i], step[j, j] = c, -s, s, c
        turn = turn @ step
    scale = rng.uniform(0.95, 1.05) * rng.uniform(0.98, 1.02, 3)
    return np.concatenate([turn * scale, (_CENTRE + rng.normal(0, 2, 3))[:, None]], axis=1)


def _shown(lesion: Lesion, scans: Sequence[ScanPlan], pose: np.ndarray) -> Lesion:
    """The lesion moved along depth, if need be, onto the nearest slice of a scan whose contrast shows it.

    Slices can lie farther apart than a lesion is long; then no picture would show what the report says.
    """
    showing = [scan for scan in scans if scan.contrast in visible_in(lesion.kind)]
    local = np.linalg.solve(pose[:, :3], lesion.centre - pose[:, 3])
    best, move = None, None
    for scan in showing:
        axis, sense = PLANES[scan.plane][0]
        ticks = sense * (np.arange(scan.slices) - (scan.slices - 1) / 2) * scan.spacing
        away = ticks - local[axis]
        nearest = away[np.abs(away).argmin()]
        if best is None or abs(nearest) < abs(best):
            best, move = nearest, axis
    if best is None or abs(best) < 0.5 * lesion.radii.min():
        return lesion
    local[move] += best
    return replace(lesion, centre=pose[:, :3] @ local + pose[:, 3])


def _add_lesion(signal, mask, points, lesion: Lesion, contrast: str, brain: np.ndarray) -> None:
    """Blends the lesion into the slices it reaches; marks it in ``mask`` whether or not the contrast shows it."""
    near = (np.abs(points - lesion.centre.astype(np.float32)) < lesion.reach).all(-1)
    if not near.any():
        return
    parts = lesion.parts(points[near])
    inside = brain[near] > 0.5  # lesions stop at the surface of the brain
    looks = LESION_SIGNAL[lesion.kind].get(contrast, {})
    values = signal[near]
    for part, share in parts.items():
        if part in looks:
            values += (looks[part] - values) * share * inside
    signal[near] = values
    mask[near] = (sum(share for part, share in parts.items() if part != "oedema") > 0.5) & inside


def _add_spots(signal, points, spots: np.ndarray, contrast: str, white: np.ndarray) -> None:
    """Small bright spots in white matter, in contrasts that show them: common, and beside the point."""
    if contrast not in SPOT_SIGNAL:
        return
    if not len(spots):
        return
    rows = np.flatnonzero(white > 0.3)
    away = torch.cdist(torch.from_numpy(points.reshape(-1, 3)[rows]), torch.from_numpy(spots)).amin(1).numpy()
    share = np.clip(1.4 - away / 3.2, 0, 1)
    rows, share = rows[share > 0], share[share > 0]
    flat = signal.reshape(-1)
    flat[rows] += (SPOT_SIGNAL[contrast] - flat[rows]) * share


def _degrade(signal: np.ndarray, contrast: str, rng: np.random.Generator, moved: bool) -> np.ndarray:
    """Coil shading, gain, ghosts of motion, and noise (Rician for MR, Gaussian for CT)."""
    depth, rows, columns = signal.shape
    if contrast != "CT":
        u, v, w = (np.linspace(-1, 1, n, dtype=np.float32) for n in (depth, rows, columns))
        a = rng.normal(0, 0.10, 6).astype(np.float32)
        shading = 1 + a[0] * u[:, None, None] + (a[1] * v + a[2] * v**2)[None, :, None] + (a[3] * w + a[4] * w**2)[None, None]
        signal = signal * np.clip(shading, 0.4, 1.8) * np.float32(rng.uniform(0.9, 1.0))
    if moved:
        shift = int(rng.integers(rows // 6, rows // 3))
        signal = 0.85 * signal + 0.15 * np.roll(signal, shift, axis=1)
    sigma = np.float32(rng.uniform(0.015, 0.04))
    noise = rng.standard_normal((2, *signal.shape), dtype=np.float32)
    if contrast == "CT":
        return signal + sigma * noise[0]
    return np.sqrt((signal + sigma * noise[0]) ** 2 + (sigma * noise[1]) ** 2)
