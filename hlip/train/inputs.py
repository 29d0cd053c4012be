"""What a config names: studies, prompts with labels, and the tokenizer. All of it is checked before anything is trained."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from torch.utils.data import Dataset

from ..evaluate import Benchmark, benchmark
from ..model import Tokenizer, train_tokenizer
from ..model.text_files import TOKENIZER_FILES
from .config import DataConfig, TrainConfig
from .examples import FolderStudies, SimulatedExamples, read_labels
from .run import context_length, from_the_hub, text_source
from .validate import check_labels

log = logging.getLogger(__name__)


def make_datasets(config: TrainConfig) -> tuple[Dataset, Dataset | None, tuple[Benchmark, dict | None] | None]:
    """Training studies, validation studies, and the benchmark with labels by study (``None``: the studies know their own).

    Raises:
        FileNotFoundError, ValueError: what the config names is not there or does not fit together; see also
            :func:`check_labels`.
    """
    data = config.data
    if data.train == "simulated":
        from ..simulate import SimulatedStudies, simulated_benchmark

        shape = {
            "image_size": data.image_size, "min_scans": data.min_scans, "max_scans": data.max_scans_simulated,
            "min_slices": data.min_slices, "max_slices": data.max_slices, "seed": config.seed,
        }  # fmt: skip
        studies = SimulatedStudies(data.num_train, split="train", **shape)
        valid = SimulatedStudies(data.num_valid, split="test", **shape) if data.num_valid else None
        return SimulatedExamples(studies), valid, (simulated_benchmark(), None)
    reading = {**how_to_read(data), **own_metadata(data)}
    studies = FolderStudies(data.train, reports=data.reports, max_scans=data.max_scans, **reading)
    if not data.valid:
        return studies, None, None
    if not (config.prompts and data.labels):
        raise ValueError(
            "data.valid needs data.labels (a CSV) and prompts (a benchmark's name or a YAML file) to be evaluated on"
        )
    chosen = benchmark(config.prompts)
    labels = read_labels(data.labels, chosen.classes)
    valid = FolderStudies(data.valid, named=labels, need_reports=False, **reading)
    check_labels(valid.names, data.valid, labels, chosen, data.labels)
    return studies, valid, (chosen, labels)


def how_to_read(data: DataConfig) -> dict:
    """Options of :class:`FolderStudies` that hold for training and validation alike.

    Raises:
        ValueError: there is no such preset, or the cache is not a folder.
    """
    from ..data import PRESETS

    if data.preset not in ("auto", *PRESETS):
        raise ValueError(f"data.preset: no preset named {data.preset!r}; choose auto or one of {', '.join(PRESETS)}")
    if data.cache and Path(data.cache).exists() and not Path(data.cache).is_dir():
        raise ValueError(f"data.cache: {data.cache} is a file, expected a folder to keep prepared scans in")
    # Only what differs from the reader's own limits, so that what was cached with those stays good.
    fresh = DataConfig()
    limits = {
        name: getattr(data, name) for name in ("min_slices", "follow_links") if getattr(data, name) != getattr(fresh, name)
    }
    return {"preset": data.preset, "cache": data.cache, **limits}


def own_metadata(data: DataConfig) -> dict:
    """The table of metadata of the config's own studies, as an option of :class:`FolderStudies`; none if it names none.

    Raises:
        FileNotFoundError, ValueError: see :func:`hlip.data.read_metadata`.
    """
    from ..data import read_metadata

    return {"metadata": read_metadata(data.metadata)} if data.metadata else {}


def make_tokenizer(config: TrainConfig, dataset: Dataset) -> Tokenizer:
    """A new run's tokenizer: the one the config names, the one beside ``model.checkpoint``, or that of the text model.

    The tiny text model's is learnt from the training reports, the same on every process.

    Raises:
        ValueError: the one to be used cannot be loaded, or there is no report to learn from.
    """
    model, length = config.model, context_length(config.model)
    if model.checkpoint and not model.tokenizer:
        place = tokenizer_beside(model.checkpoint)
        if place is not None:  # the words that its text tower knows
            with from_the_hub("model.checkpoint", str(place)):
                return Tokenizer(place, length)
        if model.text == "tiny":
            log.warning(
                "model.checkpoint: no tokenizer lies beside %s; one is learnt from these reports, whose words have other "
                "numbers than those its text tower was trained with (model.tokenizer names one)", model.checkpoint,
            )  # fmt: skip
    if model.tokenizer or model.text != "tiny":
        source = model.tokenizer or text_source(model)
        with from_the_hub("model.tokenizer" if model.tokenizer else "model.text", source):
            return Tokenizer(source, length)
    if isinstance(dataset, SimulatedExamples):
        texts = dataset.studies.all_sentences(1000)
    else:
        texts = [sentence for sentences in dataset.reports for sentence in sentences]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer([config.prompt, *texts], folder, context_length=length)


def tokenizer_beside(weights: str) -> Path | None:
    """The folder of the tokenizer that lies beside a weights file or in its folder: a run's, or a snapshot's."""
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent
    places = (folder / "tokenizer", folder)
    return next((place for place in places if any((place / name).is_file() for name in TOKENIZER_FILES)), None)
