"""YAML files that people write: every mistake that can be told is told with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .text_file import read_text


def read_yaml(path: str | Path) -> Any:
    """What a file says: plain data, ``None`` for an empty one.

    Raises:
        ValueError: it is not text, not YAML, or sets a name twice; the message says where. OSError: it cannot be opened.
    """
    text = read_text(path)
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError(f"{path}: not readable as YAML: nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a name that is set twice, which YAML forbids, and of which the safe loader keeps the last."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and seen.setdefault((key.tag, key.value), key) is not key:
                first = seen[key.tag, key.value].start_mark.line + 1
                raise yaml.YAMLError(f"lines {first} and {key.start_mark.line + 1} both set {key.value!r}: keep one")
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of a date, say
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {node.value!r}: {error}; text goes into quotation marks") from error
