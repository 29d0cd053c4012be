"""Reads zero-shot benchmarks (classes, phrases, templates) from YAML: the published ones, or a user's own file."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        against: class name -> sentences that deny it, likewise; empty: classes are not scored against their denials.
    """

    name: str
    kind: str
    prompts: dict[str, tuple[str, ...]]
    against: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
    from ..yaml_file import read_yaml

    return parse(path.stem, read_yaml(path), where=str(path))


def parse(name: str, entry: Any, *, where: str = "") -> Benchmark:
    """One benchmark from plain data, of the form that ``prompts.yaml`` explains.

    Args:
        name: of the benchmark. where: what messages call it (default: ``name``).

    Raises:
        ValueError: an entry is missing, unknown, or not of the type it must be.
    """
    where = where or name
    if not isinstance(entry, Mapping) or not entry.get("classes"):
        raise ValueError(f"{where}: a prompt file needs 'classes': a list of names, or a mapping of names to phrases")
    known = ("kind", "classes", "templates", "plain", "against")
    unknown = set(entry) - set(known)
    if unknown:
        names = ", ".join(sorted(map(reprlib.repr, unknown)))
        raise ValueError(f"{where}: unknown entries {names}; known are {', '.join(known)}")
    kind = entry.get("kind", "multilabel")
    if kind not in ("multilabel", "multiclass"):
        raise ValueError(f"{where}: kind must be 'multilabel' or 'multiclass', got {reprlib.repr(kind)}")
    templates = ["This study shows: {c}."] if entry.get("templates") is None else entry["templates"]
    templates = _texts(templates, f"{where}: templates")
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{where}: template {template!r} lacks {{c}}, the place of the class phrase")
    phrases = _phrases(entry["classes"], f"{where}: classes")
    plain = set(_texts(entry["plain"], f"{where}: plain")) if entry.get("plain") else set()
    if plain - set(phrases):
        raise ValueError(f"{where}: 'plain' names {sorted(plain - set(phrases))}, which are no classes")
    denials = _denials(entry.get("against"), phrases, kind, f"{where}: against")

    def sentences(of: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
        used = {label: templates[:1] if label in plain else templates for label in of}
        return {label: tuple(t.replace("{c}", text) for text in texts for t in used[label]) for label, texts in of.items()}

    return Benchmark(name, kind, sentences(phrases), sentences(denials))


def _denials(value: Any, phrases: dict[str, list[str]], kind: str, where: str) -> dict[str, list[str]]:
    """Phrases that deny each class; none if ``value`` is ``None``."""
    if value is None:
        return {}
    if kind != "multilabel":
        raise ValueError(f"{where}: classes of kind {kind} are scored against each other; leave it out, or say multilabel")
    if isinstance(value, str):
        if "{c}" not in value:
            raise ValueError(f"{where} {value!r} lacks {{c}}, the place of the class phrase")
        return {label: [value.replace("{c}", text) for text in texts] for label, texts in phrases.items()}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a text with {{c}}, or a mapping of all classes to phrases, got {_said(value)}")
    denials = _phrases(value, where)
    for problem, wrong in (("lacks", set(phrases) - set(denials)), ("names", set(denials) - set(phrases))):
        if wrong:
            end = "" if problem == "lacks" else ", which is no class"
            raise ValueError(f"{where} {problem} {min(wrong)!r}{end}: it must have the names of 'classes'")
    return {label: denials[label] for label in phrases}


def _phrases(classes: Any, where: str) -> dict[str, list[str]]:
    """Phrases by class."""
    if isinstance(classes, Mapping):
        names = [_text(name, f"{where}: the name") for name in classes]
        return {name: _texts(value, f"{where}: {name}") for name, value in zip(names, classes.values(), strict=True)}
    if not isinstance(classes, list):
        raise ValueError(f"{where} must be a list of names, or a mapping of names to phrases, got {_said(classes)}")
    names = _texts(classes, where)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: {twice[0]!r} is there twice")
    return {name: [name] for name in names}


def _texts(value: Any, where: str) -> list[str]:
    """One text or a list of them, as a list."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where} must be text or a list of texts, got {_said(value)}")
    return [_text(each, f"{where}: entry {i}") for i, each in enumerate(value, start=1)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        hint = "; put it in quotation marks" if isinstance(value, bool | int | float) else ""
        raise ValueError(f"{where} must be text, got {_said(value)}{hint}")
    if not value.strip():
        raise ValueError(f"{where} must be text, got an empty one")
    return value


def _said(value: Any) -> str:
    """A value as a person would call it, never longer than a line."""
    if isinstance(value, bool):
        return f"yes or no ({value})"
    if value is None:
        return "nothing"
    kinds = {int: "the number", float: "the number", str: "the text", list: "the list", dict: "the mapping"}
    return f"{kinds.get(type(value), type(value).__name__)} {reprlib.repr(value)}"


@cache
def _published() -> dict:
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("prompts.yaml").read_text(encoding="utf-8"))
