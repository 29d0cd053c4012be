"""Volumes whose slope, intercept and spacing are in a table, named by base name, as those of CT-RATE: synthetic files only."""

from __future__ import annotations

import pickle
import re
import struct

import finished_run
import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from data_files import array, stack

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from hlip.cli import main
from hlip.data import PRESETS, FileMetadata, Metadata, hounsfield_hint, prepare, read_metadata, read_study
from hlip.train.config import config_from
from hlip.train.examples import FolderStudies, read_labels, read_reports
from hlip.train.inputs import make_datasets
from hlip.train.places import study_places
from hlip.train.prepared import PreparedCache, prepare_volumes

place, run = finished_run.place, finished_run.run
HEADER = "VolumeName,Manufacturer,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\n"
NAMES = ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz", "valid_2_a_1.nii.gz"]


def chest(path, scale=(1.0, 0.0), air=0):
    """A box of tissue in air, unsigned as scanners store it; 1 mm voxels in the header. Returns what ITK is given to store."""
    values = np.full((12, 40, 50), air, np.int16)
    values[2:-2, 10:-10, 5:-5] = 1060
    values[4:8, 15:25, 10:20] = 150
    image = sitk.GetImageFromArray(values)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetOrigin((7, -5, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    if scale != (1.0, 0.0):  # as ITK cannot write it
        data = bytearray(path.read_bytes())
        data[112:120] = struct.pack("<2f", *scale)
        path.write_bytes(data)
    return values


def table(path, *rows, header=HEADER):
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture
def ct_rate(tmp_path):
    """The shape of the validation set: three volumes of two patients, and the tables beside them."""
    for name in NAMES:
        patient, visit = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
        chest(tmp_path / "dataset" / "valid" / patient / visit / name)
    table(tmp_path / "meta.csv", *(f'{name},X,1,-1024,"[0.5, 0.5]",2.5' for name in NAMES))
    classes = ["Medical material", *yaml_classes()]
    rows = [",".join([name, *(str((i + j) % 2) for j in range(len(classes)))]) for i, name in enumerate(NAMES)]
    table(tmp_path / "ct_labels.csv", *rows, header=",".join(["VolumeName", *classes]) + "\n")
    return tmp_path


def yaml_classes():
    from hlip.evaluate import benchmark

    return list(benchmark("ct_rate").classes)


# ------------------------------------------------------------------ the table


def test_numbers_are_read_by_base_name_and_rows_complete_each_other(tmp_path):
    found = read_metadata(table(tmp_path / "m.csv", 'a/b/x.nii.gz,X,2,-8,"[0.5, 0.75]",', 'x.nii.gz,Y,,,"[0.5, 0.75]",1.5',
                                "y.nii,,,,0.7,", "z.mha,,,,,", ""))  # fmt: skip
    x, y = found["x.nii.gz"], found["y.nii"]
    assert (x.slope, x.intercept, x.columns_mm, x.rows_mm, x.slices_mm) == (2, -8, 0.5, 0.75, 1.5)
    assert (y.slope, y.intercept, y.columns_mm, y.rows_mm, y.slices_mm) == (None, None, 0.7, 0.7, None)
    assert set(found) == {"x.nii.gz", "y.nii", "z.mha"} and "x" not in found
    other = read_metadata(table(tmp_path / "n.csv", "u.nii,3", header="file,ZSpacing\n"))
    assert other["u.nii"].slices_mm == 3 and repr(other) == repr(pickle.loads(pickle.dumps(other))) != repr(found)


def test_a_folder_of_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CSV of metadata in this folder"):
        read_metadata(tmp_path)
    table(tmp_path / "train_metadata.csv", "a.nii,X,1,0,0.5,1")
    table(tmp_path / "validation_metadata.csv", "b.nii,X,1,0,0.5,1")
    assert set(read_metadata(tmp_path)) == {"a.nii", "b.nii"}
    table(tmp_path / "validation_metadata.csv", "a.nii,X,1,0,0.5,2")
    with pytest.raises(ValueError, match=r"validation_metadata.csv, line 2: slices_mm of 'a.nii' is 2 here and 1 in .*train_"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("text, words", [
    ("", "expected a column VolumeName or file and at least one of RescaleSlope, .* found none"),
    ("volume,ZSpacing\na.nii,1\n", "expected a column VolumeName or file .* found volume, ZSpacing"),
    ("VolumeName,Manufacturer\na.nii,1\n", "expected .* at least one of RescaleSlope"),
    ("file,ZSpacing,ZSpacing\na.nii,1,2\n", r"has twice the column\(s\) ZSpacing"),
    ("file,ZSpacing\n,1\n", r"line 2: no file is named \(column file\)"),
    ("file,ZSpacing\na.nii,1\na.nii,1\n\na.nii,2\n", "line 5: slices_mm of 'a.nii' is 2 here and 1 in .*line 2; keep one"),
    ("file,RescaleSlope\na.nii,one\n", "line 2: RescaleSlope is 'one', expected a number other than 0"),
    ("file,RescaleSlope\na.nii,0\n", "RescaleSlope is '0', expected a number other than 0"),
    ("file,RescaleIntercept\na.nii,nan\n", "RescaleIntercept is 'nan', expected a number"),
    ("file,ZSpacing\nb.nii,1\na.nii,-1\n", "line 3: ZSpacing is '-1', expected a length in mm"),
    ('file,XYSpacing\na.nii,"[0.5, 0.5, 1]"\n', "XYSpacing is .*, expected one or two lengths in mm, as"),
    ('file,XYSpacing\na.nii,"__import__(\'os\')"\n', "line 2: XYSpacing is"),
    ("file,XYSpacing\na.nii,[]\n", "line 2: XYSpacing is"),
    ("file,ZSpacing\na.nii,1,2\n", "line 2: 3 fields, but the header has 2"),
    ('file,ZSpacing\n"a.nii,1\n', "line 3: not readable as CSV|line 2: not readable as CSV"),
])  # fmt: skip
def test_mistakes_in_the_table_are_told_with_file_and_line(tmp_path, text, words):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'm.csv'}.*{words}"):
        read_metadata(tmp_path / "m.csv")
    with pytest.raises(FileNotFoundError, match="no such metadata file"):
        read_metadata(tmp_path / "absent.csv")


# ------------------------------------------------------------------ what becomes of a scan


@pytest.mark.parametrize("suffix, scale", [
    (".nii.gz", (1.0, 0.0)), (".nii", (1.0, 0.0)), (".nii", (2.0, -1000.0)), (".nii", (0.1, 3.0)), (".nii", (0.0, 5.0)),
    (".nii", (float("nan"), 5.0)), (".nii", (2.0, float("nan"))), (".nrrd", (1.0, 0.0)), (".mha", (1.0, 0.0)),
])  # fmt: skip
def test_stored_values_are_rescaled_and_spaced_by_the_table(tmp_path, suffix, scale):
    stored = chest(tmp_path / f"a{suffix}", scale)
    metadata = read_metadata(table(tmp_path / "m.csv", f'a{suffix},X,1.5,-1024,"[0.5, 0.75]",2.5'))
    (scan,) = read_study(tmp_path / f"a{suffix}", metadata=metadata).scans
    assert np.array_equal(array(scan), stored * np.float32(1.5) - 1024)
    assert scan.spacing == (2.5, 0.75, 0.5) and scan.spacing_in_file == (1, 1, 1)
    (note,) = [note for note in scan.notes if "metadata" in note]
    assert "slope 1.5 and intercept -1024" in note and "spacing 2.5 x 0.75 x 0.5 mm, in place of 1 x 1 x 1" in note
    assert ("intercept -1024, in place of" in note) == (scale != (1.0, 0.0))


def test_what_the_table_does_not_say_is_as_in_the_file(tmp_path):
    stored = chest(tmp_path / "a.nii", (2.0, -1000.0))
    chest(tmp_path / "b.nii")
    metadata = read_metadata(table(tmp_path / "m.csv", "a.nii,X,,,,4", "b.nii,X,,-1024,,"))
    a, b = read_study(tmp_path, metadata=metadata).scans
    assert np.array_equal(array(a), stored * 2.0 - 1000) and a.spacing == (4, 1, 1)
    assert np.array_equal(array(b), stored - 1024.0) and b.spacing == (1, 1, 1)
    assert np.array_equal(array(read_study(tmp_path / "b.nii", metadata=Metadata({})).scans[0]), stored)


def test_values_without_end_are_not_read(tmp_path):
    chest(tmp_path / "a.nii")
    chest(tmp_path / "b.nii")
    study = read_study(tmp_path, metadata=read_metadata(table(tmp_path / "m.csv", "a.nii,X,1e38,0,,")))
    assert [scan.name for scan in study.scans] == ["b"] and "slope 1e+38" in study.warning()


def test_dicom_has_its_own(tmp_path):
    stack(tmp_path / "s", range(5))
    before = read_study(tmp_path / "s").scans[0]
    metadata = read_metadata(table(tmp_path / "m.csv", *(f"s{i},X,2,-5,0.5,1" for i in range(5))))
    (scan,) = read_study(tmp_path / "s", metadata=metadata).scans
    assert np.array_equal(array(scan), array(before)) and scan.spacing == before.spacing


@pytest.mark.parametrize("preset", ["chest-ct", "chest-ct-ragged", "head-ct"])
def test_presets_take_the_tables_spacing_and_maps_lie_over_the_file(tmp_path, preset):
    chest(tmp_path / "a.nii")
    metadata = read_metadata(table(tmp_path / "m.csv", 'a.nii,X,1,-1024,"[2, 4]",6'))
    (plain,), (scan,) = (read_study(tmp_path / "a.nii", metadata=known).scans for known in (None, metadata))
    made = prepare(scan, preset)[0]
    image = sitk.Image(plain.image)
    image.SetSpacing((2, 4, 6))
    plain.image = image - 1024
    as_if = prepare(plain, preset)[0]
    assert np.array_equal(made.voxels, as_if.voxels) and made.spacing == as_if.spacing
    for corner in ((0, 0, 0), (3, 5, 7), (20, 11, 2)):  # the same voxel, found by way of each geometry
        there = plain.image.TransformPhysicalPointToContinuousIndex((as_if.affine @ [*corner, 1])[:3].tolist())
        in_file = sitk.ReadImage(str(tmp_path / "a.nii"))
        here = in_file.TransformPhysicalPointToContinuousIndex((made.affine @ [*corner, 1])[:3].tolist())
        assert np.allclose(here, there, atol=1e-4)


# ------------------------------------------------------------------ hints


def hint(path, preset="chest-ct", metadata=None):
    return hounsfield_hint(read_study(path, metadata=metadata).scans[0], PRESETS[preset])


@pytest.mark.parametrize("air", [0, -2000])
def test_values_that_are_no_hounsfield_units_are_told(tmp_path, air):
    chest(tmp_path / "a.nii", air=air)
    metadata = read_metadata(table(tmp_path / "m.csv", "a.nii,X,1,-1024,,"))
    assert re.search(f"a: values from {air} to 1060, hardly any near air.*--metadata", hint(tmp_path / "a.nii"))
    if not air:
        assert "none below 0" in hint(tmp_path / "a.nii", "head-ct") and not hint(tmp_path / "a.nii", "chest-ct", metadata)
    assert not hint(tmp_path / "a.nii", "mri") and not hint(tmp_path / "a.nii", "mri-published-48")


def test_a_table_for_files_that_are_right_already_is_told(tmp_path):
    image = sitk.GetImageFromArray(chest(tmp_path / "a.nii") - np.int16(1024))
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    metadata = read_metadata(table(tmp_path / "m.csv", "a.nii,X,1,-1024,,"))
    assert not hint(tmp_path / "a.nii") and "near soft tissue, 0, are no" in hint(tmp_path / "a.nii", metadata=metadata)


def test_dicom_and_heads_cut_out_are_not_told(tmp_path):
    stack(tmp_path / "s", range(5), Modality="CT")
    assert not hint(tmp_path / "s")
    brain = np.zeros((5, 20, 20), np.int16)
    brain[1:4, 5:15, 5:15] = 60
    sitk.WriteImage(sitk.GetImageFromArray(brain), str(tmp_path / "brain.nii"))
    assert not hint(tmp_path / "brain.nii", "head-ct")


def test_training_tells_once_and_info_tells(ct_rate, caplog, capsys, monkeypatch):
    monkeypatch.chdir(ct_rate / "dataset")
    studies = FolderStudies("valid", named=NAMES, need_reports=False, preset="chest-ct")
    assert [e.name for e in (studies[0], studies[0], studies[1])] == [NAMES[0], NAMES[0], NAMES[1]]
    assert [record.getMessage()[:39] for record in caplog.records] == [f"{name}: {name[:-7]}: values" for name in NAMES[:2]]
    file = f"valid/valid_1/valid_1_a/{NAMES[0]}"
    assert main(["info", file, "--preset", "chest-ct"]) == 0
    assert "note: valid_1_a_1: values from 0 to 1060" in capsys.readouterr().out
    assert main(["info", file, "--preset", "chest-ct", "--metadata", "../meta.csv"]) == 0
    out = capsys.readouterr().out
    assert "no Hounsfield" not in out and "12 x 40 x 50, 2.5 x 0.5 x 0.5 mm" in out and "from the metadata: slope 1" in out
    assert main(["info", file]) == 0 and "no Hounsfield" not in capsys.readouterr().out  # auto: may be an MR


# ------------------------------------------------------------------ tables by base name


def test_rows_may_name_files_deeper_down(ct_rate, tmp_path):
    valid = ct_rate / "dataset" / "valid"
    found = study_places(valid, NAMES[:2])
    assert list(found) == [*NAMES[:2], "valid_2"] and found[NAMES[1]] == valid / "valid_1" / "valid_1_a" / NAMES[1]
    assert list(study_places(ct_rate, NAMES)) == NAMES
    assert list(study_places(valid, ["absent.nii.gz", "notes.txt"])) == ["valid_1", "valid_2"]
    with pytest.raises(ValueError, match=rf"'valid_1/valid_1_a/{NAMES[0]}' and '{NAMES[0]}' in tables are the same file"):
        study_places(valid, [NAMES[0], f"valid_1/valid_1_a/{NAMES[0]}"])
    chest(valid / "valid_3" / NAMES[0])
    with pytest.raises(ValueError, match=rf"'{NAMES[0]}' in a table could be .*valid_1_a/{NAMES[0]} or .*valid_3/{NAMES[0]}:"):
        study_places(valid, NAMES)
    (valid / NAMES[0]).symlink_to(valid / "valid_3" / NAMES[0])  # a file right there is meant
    assert study_places(valid, NAMES)[NAMES[0]] == valid / NAMES[0]


def test_links_to_files_deeper_down_are_told(ct_rate, caplog):
    valid = ct_rate / "dataset" / "valid"
    file = valid / "valid_1" / "valid_1_a" / NAMES[0]
    file.rename(ct_rate / "elsewhere.nii.gz")
    file.symlink_to(ct_rate / "elsewhere.nii.gz")
    assert NAMES[0] not in study_places(valid, NAMES) and "passed over 1 link" in caplog.text
    assert NAMES[0] in study_places(valid, NAMES, follow_links=True)


def test_columns_may_be_called_as_in_ct_rate(ct_rate, tmp_path):
    labels = read_labels(ct_rate / "ct_labels.csv", ["Emphysema", "Lung nodule"])
    assert list(labels) == NAMES and labels[NAMES[0]] == [1.0, 1.0]
    reports = table(tmp_path / "r.csv", f'{NAMES[0]},,,"Nodule. No effusion.",Nodule?', f"{NAMES[1]},,,,Normal.",
                    header="VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN\n")  # fmt: skip
    assert read_reports(reports) == {NAMES[0]: ["Nodule.", "No effusion.", "Nodule?"], NAMES[1]: ["Normal."]}
    table(reports, "a,b,Mass.", header="VolumeName,study,report\n")
    assert read_reports(reports) == {"b": ["Mass."]}
    table(reports, ",Mass.", header="VolumeName,Findings_EN\n")
    with pytest.raises(ValueError, match="line 2: no study is named \\(column 'VolumeName'\\)"):
        read_reports(reports)
    table(reports, "a,Mass.", header="VolumeName,text\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) report; expected"):
        read_reports(reports)


# ------------------------------------------------------------------ training, evaluation, vectors, maps


def test_prepared_scans_are_kept_by_what_the_table_says_of_their_files(ct_rate):
    folder, said = ct_rate / "dataset" / "valid" / "valid_1", []
    cache = PreparedCache(ct_rate / "cache", said.append)
    known = read_metadata(ct_rate / "meta.csv")
    cache.get(folder, "chest-ct-ragged", metadata=known)
    assert cache.has(folder, "chest-ct-ragged", metadata=known) and not cache.has(folder, "chest-ct-ragged")
    others = {name: row for name, row in known.items() if name != NAMES[2]}
    assert cache.has(folder, "chest-ct-ragged", metadata=Metadata(others))
    others[NAMES[1]] = FileMetadata(1, -1000, 0.5, 0.5, 2.5)
    assert not cache.has(folder, "chest-ct-ragged", metadata=Metadata(others)) and not said
    cache.get(folder, "chest-ct-ragged")
    assert cache.has(folder, "chest-ct-ragged", metadata=Metadata({NAMES[2]: known[NAMES[2]]}))


def test_a_config_names_the_table(ct_rate, caplog):
    table(ct_rate / "r.csv", *(f"{name},Nodule." for name in NAMES), header="VolumeName,Findings_EN\n")
    table(ct_rate / "meta.csv", *(f'{name},X,1,-1024,"[0.5, 0.5]",2.5' for name in NAMES[:2]))
    data = {"train": str(ct_rate / "dataset" / "valid"), "reports": str(ct_rate / "r.csv"), "preset": "chest-ct",
            "metadata": str(ct_rate / "meta.csv"), "labels": str(ct_rate / "ct_labels.csv")}  # fmt: skip
    config = config_from({"data": {**data, "valid": data["train"]}, "prompts": "ct_rate"})
    train, valid, _ = make_datasets(config)
    told = f"1 of 3 volume files have no row in {ct_rate / 'meta.csv'} and are read as their headers say, e.g."
    assert [told in record.getMessage() and NAMES[2] in record.getMessage() for record in caplog.records] == [True, True]
    assert config.to_dict()["data"]["metadata"] == str(ct_rate / "meta.csv") and train.names == valid.names == NAMES
    before = FolderStudies(data["train"], named=NAMES, need_reports=False, preset="chest-ct")
    same = [np.array_equal(a.scans[0], b.scans[0]) for a, b in zip(train, before, strict=True)]
    assert same == [False, False, True]


def test_a_run_is_evaluated_on_it_as_downloaded(ct_rate, run, capsys, caplog):
    command = ["evaluate", "run", "--studies", "dataset/valid", "--labels", "ct_labels.csv", "--prompts", "ct_rate",
               "--preset", "chest-ct"]  # fmt: skip
    assert main([*command, "--scores", "plain.csv"]) == 0 and "no Hounsfield units" in caplog.text
    caplog.clear()
    assert main([*command, "--scores", "known.csv", "--metadata", "meta.csv"]) == 0
    assert "no Hounsfield" not in caplog.text and "metadata" not in caplog.text.replace("meta.csv", "")
    plain, known = ((ct_rate / f"{name}.csv").read_text().splitlines() for name in ("plain", "known"))
    assert [row.split(",")[0] for row in known] == ["study", *NAMES] and plain[1:] != known[1:]
    files = sorted(str(p.relative_to(ct_rate)) for p in (ct_rate / "dataset").rglob("*.nii.gz"))
    embed = ["embed", *files, "--run", "run", "--out", "f.npz", "--preset", "chest-ct"]
    assert main([*embed, "--metadata", "meta.csv"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", "--features", "f.npz", "--labels", "ct_labels.csv", "--prompts", "ct_rate",
                 "--scores", "stored.csv"]) == 0  # fmt: skip
    stored = [row.split(",") for row in (ct_rate / "stored.csv").read_text().splitlines()[1:]]
    now = [row.split(",") for row in known[1:]]
    assert [row[0] for row in stored] == NAMES
    assert np.allclose(np.array([r[1:17] for r in stored], float), np.array([r[1:17] for r in now], float), atol=1e-4)


def test_a_runs_own_table_is_that_of_its_own_studies(ct_rate, run, caplog):
    config = yaml.safe_load((ct_rate / "run" / "config.yaml").read_text())
    data = {"valid": "dataset/valid", "labels": "ct_labels.csv", "metadata": "meta.csv", "preset": "chest-ct"}
    (ct_rate / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], **data},
                                                                 "prompts": "ct_rate"}))  # fmt: skip
    assert main(["evaluate", "run"]) == 0 and "no Hounsfield" not in caplog.text
    assert main(["evaluate", "run", "--metadata", "absent.csv"]) == 1
    (ct_rate / "meta.csv").unlink()
    assert main(["embed", "studies", "--run", "run", "--out", "f.npz"]) == 0  # others': needs no table
    assert main(["evaluate", "run"]) == 1


def test_vectors_are_gone_on_with_by_what_the_table_says(ct_rate, run, capsys, monkeypatch):
    from hlip.cli import vectors

    add = vectors.Vectors.add

    def first(self, names, features):
        add(self, names, features)
        raise KeyboardInterrupt

    files = [f"dataset/valid/valid_1/valid_1_a/{name}" for name in NAMES[:2]]
    command = ["embed", *files, "--run", "run", "--out", "f.npz", "--preset", "chest-ct"]
    with monkeypatch.context() as patch:
        patch.setattr(vectors.Vectors, "add", first)
        assert main([*command, "--metadata", "meta.csv"]) == 130
    (ct_rate / "meta.csv").rename(ct_rate / "copy.csv")
    text = (ct_rate / "copy.csv").read_text()
    (ct_rate / "other.csv").write_text(text.replace("2.5", "3"))
    for more in ([], ["--metadata", "other.csv"]):
        assert main([*command, "--resume", *more]) == 1
        assert "of scans prepared in another way" in capsys.readouterr().err
    assert main([*command, "--resume", "--metadata", "copy.csv"]) == 0
    assert "2 of 2 studies, 1 of them before" in capsys.readouterr().out


def test_maps_lie_over_the_file(ct_rate, run, caplog):
    pytest.importorskip("matplotlib")
    file = f"dataset/valid/valid_1/valid_1_a/{NAMES[0]}"
    assert main(["explain", file, "--run", "run", "--text", "mass", "--out", "maps", "--preset", "chest-ct",
                 "--metadata", "meta.csv"]) == 0  # fmt: skip
    assert "no row" not in caplog.text
    image, scan = sitk.ReadImage(str(ct_rate / "maps" / "01-valid_1_a_1.nii.gz")), sitk.ReadImage(file)
    middle = [(n - 1) / 2 for n in image.GetSize()]
    there = scan.TransformPhysicalPointToContinuousIndex(image.TransformContinuousIndexToPhysicalPoint(middle))
    assert np.allclose(there, [(n - 1) / 2 for n in scan.GetSize()], atol=1.1)
    # A voxel of the map is 3 x 1 x 1 mm of the table, whose voxels are of 2.5 x 0.5 x 0.5 mm, and 1 mm in the header.
    assert np.allclose(image.GetSpacing(), (2, 2, 1.2), rtol=1e-3)
    volumes, _, _ = prepare_volumes(ct_rate / file, "chest-ct", metadata=read_metadata(ct_rate / "meta.csv"))
    assert np.allclose(volumes[0].spacing, (3, 1, 1), rtol=1e-3)
    assert main(["explain", "studies/s0", "--run", "run", "--text", "mass", "--metadata", "meta.csv"]) == 0
    assert "1 of 1 volume files have no row in meta.csv" in caplog.text
