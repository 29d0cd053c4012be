"""MetaImage headers, written anew for ITK.

A MetaImage header can name any other file as the place of its voxels, ITK reads whatever it names, and how ITK divides
a header into fields can be bent: by odd blanks, by arrays that are too short, by lines without an end. So ITK never
sees the header of a file, only the few fields below, checked one by one, and the place of the voxels is set here.
"""

from __future__ import annotations

import re
from pathlib import Path

# Real headers have some hundred bytes; with the fields of a DICOM series, thousands.
_MOST_BYTES = 1 << 20
_MOST_DIMENSIONS = 10  # ITK's own limit
_WORD, _WHOLE, _NUMBER = r"[A-Za-z0-9_]+", r"[0-9]{1,18}", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# Field: what each of its values looks like, and how many there are: to the power of what is given, of the dimensions.
_FIELDS = {
    "ElementType": (_WORD, 0),
    "BinaryData": (_WORD, 0),
    "BinaryDataByteOrderMSB": (_WORD, 0),
    "ElementByteOrderMSB": (_WORD, 0),
    "CompressedData": (_WORD, 0),
    "CompressedDataSize": (_WHOLE, 0),
    "ElementNumberOfChannels": (_WHOLE, 0),
    "HeaderSize": (r"-1|" + _WHOLE, 0),
    "DimSize": (_WHOLE, 1),
    "ElementSpacing": (_NUMBER, 1),
    "ElementSize": (_NUMBER, 1),
    "Offset": (_NUMBER, 1),
    "Position": (_NUMBER, 1),
    "Origin": (_NUMBER, 1),
    "ImagePosition": (_NUMBER, 1),
    "TransformMatrix": (_NUMBER, 2),
    "Rotation": (_NUMBER, 2),
    "Orientation": (_NUMBER, 2),
}


class MetaImageError(ValueError):
    """A MetaImage file that cannot be read; the message says why."""


def metaimage_header_for_itk(path: Path, voxels: str) -> str:
    """The text of a header (.mhd) that says about the voxels what the header of a .mha file says.

    Args:
        path: the file, with its voxels in it.
        voxels: by which name the same file is found beside the new header.

    Raises:
        MetaImageError: voxels in another file, another format, or a header that cannot be.
    """
    with open(path, "rb") as file:
        head = file.read(_MOST_BYTES)
    end = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:]([^\n]*)\n", head, re.MULTILINE | re.IGNORECASE)
    if not end:
        raise MetaImageError("not a MetaImage file (empty, damaged, or another format)")
    if end[1].strip().upper() != b"LOCAL":
        raise MetaImageError("its voxels are in another file, which is not followed: save as a single .mha file")
    fields: dict[str, list[str]] = {}
    for line in head[: end.start()].decode("latin-1").split("\n"):
        name, _, value = line.replace(":", "=", 1).partition("=")
        if name.strip() in fields:
            raise MetaImageError(f"damaged MetaImage header: two fields named {name.strip()}")
        if name.strip() in ("NDims", *_FIELDS):
            fields[name.strip()] = value.split()
    return _written(fields, end.end(), path.stat().st_size - end.end(), voxels)


def _written(fields: dict[str, list[str]], offset: int, left: int, voxels: str) -> str:
    """``offset``: where the voxels begin. ``left``: how many bytes there are from there on."""
    dimensions = " ".join(fields.pop("NDims", []))
    if not re.fullmatch("[0-9]{1,2}", dimensions) or not 1 <= int(dimensions) <= _MOST_DIMENSIONS:
        raise MetaImageError(f"damaged MetaImage header: expected a line 'NDims = 3' (1 to {_MOST_DIMENSIONS})")
    for name, values in fields.items():
        kind, power = _FIELDS[name]
        if len(values) != int(dimensions) ** power or not all(re.fullmatch(kind, value) for value in values):
            raise MetaImageError(f"damaged MetaImage header: {name} is not what it has to be")
    if fields.get("CompressedData", ["F"])[0][0] in "Tt1":
        size = int(fields.get("CompressedDataSize", "0")[0]) or left
        if size > left:
            raise MetaImageError("cut short or damaged")
        fields["CompressedDataSize"] = [str(size)]
    if fields.get("HeaderSize", ["0"]) == ["0"]:
        fields["HeaderSize"] = [str(offset)]
    lines = [f"{name} = {' '.join(values)}" for name, values in fields.items()]
    return "\n".join(["ObjectType = Image", f"NDims = {dimensions}", *lines, f"ElementDataFile = {voxels}\n"])
