"""Reads zero-shot benchmarks (classes, phrases, templates) from YAML: the published ones, or a user's own file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """Classes and the sentences that stand for them.

    Attributes:
        name: of the benchmark.
        kind: ``"multilabel"`` (classes are scored independently) or ``"multiclass"`` (they compete).
        prompts: class name -> sentences; a class's text feature is the mean over them.
    """

    name: str
    kind: str
    prompts: dict[str, tuple[str, ...]]

    @property
    def classes(self) -> list[str]:
        return list(self.prompts)


@cache
def benchmarks() -> tuple[str, ...]:
    """Names of the benchmarks that come with the package."""
    return tuple(_published()["benchmarks"])


def benchmark(name_or_path: str | Path) -> Benchmark:
    """A published benchmark by name, or one from a YAML file of the form of one entry of ``prompts.yaml``.

    Raises:
        ValueError: unknown name, or a file that does not say what is needed; the message says what.
        FileNotFoundError: a path that does not exist.
    """
    text = str(name_or_path)
    if text in benchmarks():
        return parse(text, _published()["benchmarks"][text])
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"no benchmark {text!r}: choose one of {', '.join(benchmarks())}, or give a .yaml file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    import yaml

    try:
        return parse(path.stem, yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error


def parse(name: str, entry: Any) -> Benchmark:
    """One benchmark from plain data: ``kind``, ``classes`` (names, or name -> phrase or phrases), ``templates``, ``plain``."""
    if not isinstance(entry, Mapping) or not entry.get("classes"):
        raise ValueError(f"{name}: a prompt file needs 'classes': a list of names, or a mapping of names to phrases")
    unknown = set(entry) - {"kind", "classes", "templates", "plain"}
    if unknown:
        raise ValueError(f"{name}: unknown entries {sorted(unknown)}; known are kind, classes, templates, plain")
    kind = entry.get("kind", "multilabel")
    if kind not in ("multilabel", "multiclass"):
        raise ValueError(f"{name}: kind must be 'multilabel' or 'multiclass', got {kind!r}")
    templates = entry.get("templates") or ["This study shows: {c}."]
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{name}: template {template!r} lacks {{c}}, the place of the class phrase")
    classes = entry["classes"]
    if not isinstance(classes, Mapping):
        classes = {c: c for c in classes}
    plain = set(entry.get("plain") or ())
    if plain - set(map(str, classes)):
        raise ValueError(f"{name}: 'plain' names {sorted(plain - set(map(str, classes)))}, which are no classes")
    prompts = {}
    for label, phrases in classes.items():
        phrases = [phrases] if isinstance(phrases, str) else list(phrases)
        used = templates[:1] if label in plain else templates
        prompts[str(label)] = tuple(template.replace("{c}", phrase) for phrase in phrases for template in used)
    return Benchmark(name, kind, prompts)


@cache
def _published() -> dict:
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("prompts.yaml").read_text())
