"""A header leads to no other file and does no harm, however it is written, and ordinary files are read as ITK reads them."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest
import SimpleITK as sitk
from data_files import array, compressed, failure, plane, volume

from hlip.data import find_studies, read_study

META = b"ObjectType = Image\nNDims = 3\nDimSize = 16 16 16\nElementType = MET_UCHAR\n"
NRRD = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 16 16 16\nencoding: raw\n"
LOCAL = b"ElementDataFile = LOCAL\n"
OWN = bytes([9]) * 4096

# SECRET stands for the path of a file outside the study. With the header as it was, ITK read most of these.
METAIMAGES = {
    "plain": META + b"ElementDataFile = SECRET\n",
    "space": META + b" ElementDataFile = SECRET\n" + LOCAL,
    "tab": META + b"\tElementDataFile = SECRET\n" + LOCAL,
    "vertical tab": META + b"\x0bElementDataFile = SECRET\n" + LOCAL,
    "carriage return": META + b"\rElementDataFile = SECRET\n" + LOCAL,
    "carriage return in a line": META + b"Comment = x\rElementDataFile = SECRET\n" + LOCAL,
    "no-break space": META + b"\xa0ElementDataFile = SECRET\n" + LOCAL,
    "colon": META + b"ElementDataFile: SECRET\n" + LOCAL,
    "no space": META + b"ElementDataFile=SECRET\n" + LOCAL,
    "blanks after it": META + b"ElementDataFile \t = SECRET\n" + LOCAL,
    "case": META + b"elementdatafile = SECRET\n" + LOCAL,
    "zero byte": META + b"ElementDataFile\0x = SECRET\n" + LOCAL,
    "list": META + b"ElementDataFile = LIST\nSECRET\n",
    "pattern": META + b"ElementDataFile = SECRE%c 84 84 1\n",
    "local and more": META + b"ElementDataFile = LOCAL SECRET\n",
    "behind a long header": META + b"Comment = x\n" * 9000 + b"ElementDataFile = SECRET\n",
    "behind an unknown long line": META + b"Foo = " + b"x" * 600 + b"\nElementDataFile = SECRET\n" + LOCAL,
    "no value before it": META + b"Comment =\n" + LOCAL + b"ElementDataFile = SECRET\n",
    "no separator before it": META + b"Comment\n" + LOCAL + b"ElementDataFile = SECRET\n",
    "array cut short": META + b"Offset = 0 0\n" + LOCAL + b"ElementDataFile = SECRET\n",
    "other array cut short": META + b"Color = 1 1 1\n" + LOCAL + b"ElementDataFile = SECRET\n",
}
NRRDS = {
    "plain": NRRD + b"data file: SECRET\n\n",
    "one word": NRRD + b"datafile: SECRET\n\n",
    "case": NRRD + b"DATA FILE: SECRET\n\n",
    "two spaces": NRRD + b"data  file: SECRET\n\n",
    "tab": NRRD + b"data\tfile: SECRET\n\n",
    "space before": NRRD + b" data file : SECRET\n\n",
    "key": NRRD + b"x:=y: data file: SECRET\ndata file: SECRET\n\n",
    "carriage return": NRRD + b"# x\rdata file: SECRET\n\n",
    "zero byte": NRRD + b"content: \0\ndata file: SECRET\n\n",
    "no end": NRRD + b"data file: SECRET\n",
    "list": NRRD + b"data file: LIST\nSECRET\n",
    "pattern": NRRD + b"data file: SECRET 1 1 1\n\n",
    "behind a long comment": NRRD + b"# " + b"x" * 70000 + b"\ndata file: SECRET\n\n",
    "behind a longer one": NRRD + b"# " + b"x" * (1 << 20) + b"\ndata file: SECRET\n\n",
}


@pytest.mark.parametrize(
    ("ending", "header"),
    [pytest.param("mha", h, id=f"mha: {k}") for k, h in METAIMAGES.items()]
    + [pytest.param("nrrd", h, id=f"nrrd: {k}") for k, h in NRRDS.items()],
)
def test_no_header_leads_to_another_file(tmp_path, ending, header):
    (tmp_path / "secret").write_bytes(bytes(range(7, 135)) * 32)
    study = tmp_path / "study"
    study.mkdir()
    content = header.replace(b"SECRET", os.fsencode(tmp_path / "secret")).replace(b"SECRE", os.fsencode(tmp_path / "secre"))
    (study / f"a.{ending}").write_bytes(content + OWN)
    try:
        scans = read_study(study).scans
    except ValueError as error:
        assert "no readable scan" in str(error)
    else:  # a line that means nothing: the file's own bytes are the voxels
        own = np.frombuffer(content + OWN, np.uint8)
        assert any((array(scans[0]).ravel() == own[i : i + 4096]).all() for i in range(len(own) - 4095))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.mha", META.replace(b"= 3", b"= 3000") + LOCAL + OWN, "expected a line 'NDims = 3'"),
        ("a.mha", META.replace(b"NDims = 3\n", b"") + LOCAL + OWN, "expected a line 'NDims = 3'"),
        ("a.mha", META.replace(b"16 16 16", b"16 16") + LOCAL + OWN, "DimSize is not what it has to be"),
        ("a.mha", META.replace(b"16 16 16", b"16 16 -16") + LOCAL + OWN, "DimSize is not what it has to be"),
        ("a.mha", META + b"DimSize = 1 1 1\n" + LOCAL + OWN, "two fields named DimSize"),
        ("a.mha", META + b"CompressedData = True\nCompressedDataSize = 99999999999999\n" + LOCAL + OWN, "cut short"),
        ("a.nrrd", NRRD + b"x" * 33000 + b"\n\n" + OWN[1:], "cut short or damaged"),
        ("a.nrrd", NRRD.replace(b"raw", b"x" * 33000) + b"\n" + OWN, "encoding is not what it has to be"),
        ("a.nrrd", NRRD.replace(b"16 16 16", b"16 16") + b"\n" + OWN, "damaged, or another format"),
    ],
)
def test_headers_that_cannot_be_are_named(tmp_path, name, content, reason, capfd):
    (tmp_path / name).write_bytes(content)
    assert reason in str(failure(tmp_path))
    assert capfd.readouterr() == ("", "")


def same_as_itk(path, values=None) -> None:
    (scan,) = read_study(path).scans
    peer = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(array(scan), sitk.GetArrayFromImage(peer) if values is None else values)
    for what in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(scan.image, what)() == getattr(peer, what)()


@pytest.mark.parametrize("ending", ["mha", "nrrd"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_written_files_are_read_as_itk_reads_them(tmp_path, ending, packed, dtype):
    image = sitk.GetImageFromArray((np.random.default_rng(0).random((4, 5, 6)) * 200).astype(dtype))
    image.SetSpacing((1.1, 0.7, 3.3))
    image.SetOrigin((-12.345, 1e-7, 1e5))
    image.SetDirection((0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, 1))
    image.SetMetaData("0010|0010", "Yamada^Tarou=\x1b$B;3")  # as a DICOM series is saved, with all its fields
    image.SetMetaData("0032|4000", "two: lines,\nboth = odd")
    sitk.WriteImage(image, str(tmp_path / f"a.{ending}"), packed)
    same_as_itk(tmp_path / f"a.{ending}")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_headers_of_other_programs(tmp_path, end):
    values = np.arange(60, dtype=">i2").reshape(3, 4, 5)
    meta = b"NDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\nDimSize = 5 4 3\nElementType = MET_SHORT\n"
    nrrd = b"NRRD0001\n# hello\nType: short\nDimension: 3\nSizes: 5 4 3\nendian: big\nspacings: 1 2 3\nfoo:=bar\nencoding: "
    files = {
        "a.mha": meta + b"ElementSize: 1 2 3\nPosition = 1 2 3\nElementDataFile = Local\n" + values.tobytes(),
        "b.mha": meta + b"ElementSpacing = 1 2 3\nHeaderSize = -1\n" + LOCAL + b"xxx" + values.tobytes(),
        "a.nrrd": nrrd + b"raw\n\n" + values.tobytes(),
        "b.nrrd": nrrd + b"gzip\n\n" + gzip.compress(values.tobytes()),
        "c.nrrd": nrrd + b"raw\nline skip: 1\nbyte skip: -1\n\nsome words\n..." + values.tobytes(),
    }
    for name, content in files.items():
        header, mark, rest = content.partition(LOCAL if LOCAL in content else b"\n\n")
        (tmp_path / name).write_bytes((header + mark).replace(b"\n", end) + rest if name != "a.mha" else content)
        same_as_itk(tmp_path / name, values)


def test_a_nifti_file_is_not_mistaken_for_one_of_the_same_name(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 4, 4), 1, np.uint8)), str(tmp_path / "x.nii"))
    sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 4, 4), 2, np.uint8)), str(tmp_path / "x.nii.gz"))
    assert sorted((scan.path.name, int(array(scan).max())) for scan in read_study(tmp_path).scans) == [
        ("x.nii", 1),
        ("x.nii.gz", 2),
    ]


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "mha", "nrrd"])
def test_names_that_are_not_utf8(tmp_path, ending):
    values = volume(tmp_path / f"a.{ending}")
    folder = os.path.join(os.fsencode(tmp_path), b"Andr\xe9")
    os.mkdir(folder)
    os.rename(tmp_path / f"a.{ending}", os.path.join(folder, b"T\xff1." + ending.encode()))
    study = read_study(os.fsdecode(folder))
    np.testing.assert_array_equal(array(study.scans[0]), values)
    assert study.scans[0].name == r"T\xff1"
    str(study).encode("utf-8")
    assert r"/Andr\xe9: 1 scan" in str(study)


def test_dicom_names_that_are_not_utf8(tmp_path):
    for i in range(3):
        compressed(tmp_path / f"{i}", plane(i, (16, 16)), ImagePositionPatient=[0, 0, i], InstanceNumber=i)
        os.rename(tmp_path / f"{i}", os.path.join(os.fsencode(tmp_path), b"\xe9%d" % i))
    study = read_study(tmp_path)
    np.testing.assert_array_equal(array(study.scans[0]), np.stack([plane(i, (16, 16)) for i in range(3)]))
    assert len(find_studies(tmp_path)) == 1
