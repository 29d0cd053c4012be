"""NRRD headers, written anew for ITK.

A NRRD header can name any other file as the place of its voxels, and ITK reads whatever it names; over long lines it
even ends the process. So ITK never sees the header of a file, only the fields below, and the place of the voxels is
set here.
"""

from __future__ import annotations

import re
from pathlib import Path

# Real headers have some hundred bytes; with the fields of a DICOM series, thousands.
_MOST_BYTES = 1 << 20
# All that says how voxels are stored and where they lie in space. A value: some printable characters.
_FIELDS = set(
    "type|dimension|space|space dimension|sizes|spacings|thicknesses|axis mins|axismins|axis maxs|axismaxs|centers|"
    "centerings|kinds|space directions|space origin|space units|units|endian|encoding|byte skip|byteskip".split("|")
)
_VALUE = re.compile(r"[ -~]{1,400}")


class NrrdError(ValueError):
    """A NRRD file that cannot be read; the message says why."""


def nrrd_header_for_itk(path: Path, voxels: str) -> str:
    """The text of a header (.nhdr) that says about the voxels what the header of a .nrrd file says.

    Args:
        path: the file, with its voxels in it.
        voxels: by which name the same file is found beside the new header.

    Raises:
        NrrdError: voxels in another file, another format, or a header that cannot be.
    """
    with open(path, "rb") as file:
        head = file.read(_MOST_BYTES)
    if not re.match(rb"NRRD[0-9]{4}\r?\n", head):
        raise NrrdError("not a NRRD file (empty, damaged, or another format)")
    end = re.search(rb"\n\r?\n", head)
    header = head[: end.start() if end else len(head)].decode("latin-1").replace("\r\n", "\n").rstrip("\r")
    kept, skip = [], 0
    for line in header.split("\n")[1:]:
        name, _, value = line.partition(": ")
        name, value = name.lower(), value.strip()
        if re.sub("[^a-z]", "", name) == "datafile":
            raise NrrdError("its voxels are in another file, which is not followed: save as a single .nrrd file")
        if name in ("line skip", "lineskip") and re.fullmatch("[0-9]{1,6}", value):
            skip = int(value)
        if name in _FIELDS:
            if not _VALUE.fullmatch(value):
                raise NrrdError(f"damaged NRRD header: {name} is not what it has to be")
            kept.append(f"{name}: {value}")
    if "\r" in header or not end:
        raise NrrdError("damaged NRRD header: expected lines of text and an empty line after them")
    skip += head[: end.end()].count(b"\n")  # lines are left out before anything is decompressed, bytes after it
    return "\n".join(["NRRD0005", *kept, f"line skip: {skip}", f"data file: {voxels}\n"])
