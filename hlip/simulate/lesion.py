"""Lesions as soft shapes in space: a bleed, an infarct, a mass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lesion:
    """A shape in MNI space.

    Attributes:
        kind: ``"hemorrhage"``, ``"infarct"`` or ``"mass"``.
        centre: mm: right, anterior, superior.
        radii: half axes of its core, mm. turn: rotation of the axes, ``(3, 3)``.
        waves, phases: of the bumps on its surface.
    """

    kind: str
    centre: np.ndarray
    radii: np.ndarray
    turn: np.ndarray
    waves: np.ndarray
    phases: np.ndarray

    @property
    def reach(self) -> float:
        """No part lies farther from the centre than this, mm."""
        return float(self.radii.max()) * (2.2 if self.kind in ("mass", "hemorrhage") else 1.4)

    @property
    def side(self) -> str:
        return "right" if self.centre[0] > 0 else "left"

    @property
    def lobe(self) -> str:
        """A rough name of the place."""
        x, y, z = self.centre
        if abs(x) < 26 and -35 < y < 20 and z < 25:
            return "deep"
        if y > 5:
            return "frontal"
        if y < -62:
            return "occipital"
        return "parietal" if z > 18 else "temporal"

    def parts(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """The share of each part at points ``(..., 3)`` in mm, 0 to 1: ``core``, and for some kinds ``rim`` and ``oedema``."""
        local = (points - self.centre) @ self.turn
        depth = np.sqrt(((local / self.radii) ** 2).sum(-1))  # 1 on the surface of the core
        bumps = np.sin(local @ self.waves + self.phases).mean(-1)
        depth = depth * (1 + 0.25 * bumps)
        core = _inside(depth, 1.0)
        if self.kind == "infarct":
            return {"core": core}
        oedema = _inside(depth, 1.5 if self.kind == "mass" else 1.2) * (1 - core)
        if self.kind == "hemorrhage":
            return {"core": core, "oedema": oedema}
        inner = _inside(depth, 0.5)
        return {"core": inner, "rim": np.clip(core - inner, 0, 1), "oedema": oedema}


def _inside(depth: np.ndarray, edge: float) -> np.ndarray:
    """1 inside ``edge``, 0 outside, a soft border between."""
    return np.clip((edge - depth) / 0.12 + 0.5, 0, 1).astype(np.float32)


def draw_lesion(kind: str, rng: np.random.Generator, places: np.ndarray) -> Lesion:
    """A lesion of a kind at one of ``places`` ``(N, 3)``, its shape as usual for the kind."""
    centre = places[rng.integers(len(places))].astype(np.float64)
    if kind == "infarct":  # flat and wide, like a vessel's territory, toward the surface
        radii = np.array([rng.uniform(16, 22), rng.uniform(24, 36), rng.uniform(22, 32)])
        centre[0] *= 1.15
    elif kind == "mass":  # nearly round
        radii = rng.uniform(20, 29) * rng.uniform(0.85, 1.15, 3)
    else:
        radii = rng.uniform(20, 29) * rng.uniform(0.75, 1.25, 3)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)) + (3 * np.eye(3) if kind == "infarct" else 0))
    bumpy = {"infarct": 1.6, "mass": 0.7, "hemorrhage": 1.2}[kind]
    return Lesion(kind, centre, radii, turn, rng.normal(size=(3, 6)) * 0.12 * bumpy, rng.uniform(0, 2 * np.pi, 6))
