"""A batch of whole studies, ragged in every dimension, as the encoder takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, int, int]

# Means of the ImageNet mean and standard deviation: what every published model is trained with.
MEAN, STD = 0.449, 0.226


@dataclass(frozen=True)
class StudyBatch:
    """All voxels of a batch in one flat tensor, and the size of every scan.

    Attributes:
        voxels: flat, one dtype (uint8, int16 or floating point), study by study, scan by scan.
        shapes: per study, per scan ``(D, H, W)`` in voxels.
        max_value: the stored value that means 1 (255 for uint8).
        mean, std: of the values in [0, 1]; the encoder sees ``(voxel / max_value - mean) / std``.
        edge: ``"pad"``: the last, partial patches of a scan are filled up with 0. ``"crop"``: they are left out.
    """

    voxels: Tensor
    shapes: tuple[tuple[Shape, ...], ...]
    max_value: float = 255.0
    mean: float = MEAN
    std: float = STD
    edge: str = "pad"

    @classmethod
    def pack(cls, studies: Sequence[Sequence[Tensor]], *, max_value: float | None = None, **options) -> StudyBatch:
        """From a list of studies, each a list of ``(D, H, W)`` scans, all of one dtype.

        Args:
            max_value: default 255 for uint8, else 1.

        Raises:
            ValueError: a scan that is not three-dimensional, or of another dtype; the message names study and scan.
        """
        scans, shapes = [], []
        for i, study in enumerate(studies):
            for j, scan in enumerate(study):
                if scan.ndim != 3:
                    raise ValueError(f"study {i}, scan {j}: expected (D, H, W), got {tuple(scan.shape)}")
                if scans and scan.dtype != scans[0].dtype:
                    raise ValueError(f"study {i}, scan {j} is {scan.dtype}, the scans before it are {scans[0].dtype}")
                scans.append(scan.reshape(-1))
            shapes.append(tuple(tuple(scan.shape) for scan in study))
        voxels = torch.cat(scans) if scans else torch.empty(0, dtype=torch.uint8)
        if max_value is None:
            max_value = 255.0 if voxels.dtype == torch.uint8 else 1.0
        return cls(voxels, tuple(shapes), max_value, **options)

    @classmethod
    def from_dense(cls, x: Tensor) -> StudyBatch:
        """From the published input ``(B, N, 1, D, H, W)``, already normalised: every study N scans of one size."""
        if x.ndim != 6 or x.shape[2] != 1:
            raise ValueError(f"a dense batch is (B, N_scans, 1, D, H, W), got {tuple(x.shape)}")
        shape = tuple(x.shape[3:])
        return cls(x.reshape(-1), ((shape,) * x.shape[1],) * x.shape[0], max_value=1.0, mean=0.0, std=1.0, edge="crop")

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> StudyBatch:
        """The same batch with its voxels on another device."""
        return replace(self, voxels=self.voxels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StudyBatch:
        """For ``DataLoader(pin_memory=True)``."""
        return replace(self, voxels=self.voxels.pin_memory())

    def __len__(self) -> int:
        """The number of studies."""
        return len(self.shapes)

    @property
    def scan_shapes(self) -> list[Shape]:
        """The sizes of all scans, one after the other."""
        return [shape for study in self.shapes for shape in study]

    def __repr__(self) -> str:
        scans = [len(study) for study in self.shapes]
        span = f"{min(scans)} to {max(scans)}" if scans else "0"
        voxels = f"{self.voxels.numel()} {self.voxels.dtype} voxels on {self.voxels.device}"
        return f"StudyBatch({len(self)} studies of {span} scans, {voxels})"
