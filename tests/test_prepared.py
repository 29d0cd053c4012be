"""Prepared scans and the folder that remembers them: what is stored is a help, never a condition."""

import logging
import os

import pytest
import torch
from data_files import stack, volume
from torch.utils.data import DataLoader

pytest.importorskip("open_clip")

from safetensors import SafetensorError

from hlip.train import prepared
from hlip.train.examples import FolderStudies
from hlip.train.prepared import PreparedStudy, prepare_study


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        volume(tmp_path / "studies" / name / "t1.nii.gz", (5, 12, 10), (1.0, 1.0, 4.0))
    return tmp_path / "studies"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_costs_one_warning_and_no_study(folder, tmp_path, monkeypatch, caplog, capfd, workers):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(prepared, "write_tensors", full)
    said = logging.StreamHandler()  # to the stream of every worker
    logging.getLogger("hlip").addHandler(said)
    try:
        studies = FolderStudies(folder, preset="mri", cache=tmp_path / "cache", need_reports=False)
        for _ in range(2):
            loaded = list(DataLoader(studies, batch_size=None, num_workers=workers, collate_fn=lambda example: example))
    finally:
        logging.getLogger("hlip").removeHandler(said)
    assert [example.name for example in loaded] == ["a", "b", "c"]
    assert all(torch.equal(example.scans[0], prepare_study(folder / example.name, "mri")[0][0]) for example in loaded)
    err = capfd.readouterr().err
    assert err.count("cannot be stored") == 1 and "No space left" in err and "left out" not in err


def test_a_broken_study_is_named_once_by_all_workers(folder, capfd):
    (folder / "b" / "t1.nii.gz").write_bytes(b"broken")
    said = logging.StreamHandler()
    logging.getLogger("hlip").addHandler(said)
    try:
        studies = FolderStudies(folder, preset="mri", need_reports=False)
        for _ in range(2):
            list(DataLoader(studies, batch_size=None, num_workers=2, collate_fn=lambda example: example))
    finally:
        logging.getLogger("hlip").removeHandler(said)
    assert capfd.readouterr().err.count("b left out") == 1


@pytest.mark.parametrize("cached", [False, True])
def test_a_study_read_in_part_or_of_two_patients_is_named_once_by_all_workers(folder, tmp_path, capfd, cached):
    (folder / "b" / "t2.nii.gz").write_bytes(b"broken")
    (folder / "b" / "notes.txt").write_text("nothing that a scan could be part of")
    for i, patient in enumerate(["p1", "p2"]):
        stack(folder / "c", [0, 1, 2], name=patient, PatientID=patient, SeriesInstanceUID=f"1.{i}")
    said = logging.StreamHandler()
    logging.getLogger("hlip").addHandler(said)
    try:
        for _ in range(2):  # the second time what was cached is used
            studies = FolderStudies(folder, preset="mri", cache=tmp_path / "cache" if cached else "", need_reports=False)
            for _ in range(2):
                loaded = list(DataLoader(studies, batch_size=None, num_workers=2, collate_fn=lambda example: example))
            assert [len(example.scans) for example in loaded] == [1, 1, 3]
            assert sorted(capfd.readouterr().err.splitlines()) == [
                "b: 1 file could not be read: 1 x not a NIfTI file (empty, damaged, or another format)",
                "c: files of 2 different patients (PatientID), read as one study: separate them",
            ]
    finally:
        logging.getLogger("hlip").removeHandler(said)


def test_a_cache_folder_that_is_a_file(folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("")
    with caplog.at_level(logging.WARNING):
        studies = FolderStudies(folder, preset="mri", cache=tmp_path / "cache", need_reports=False)
        assert all(studies[i] is not None for i in range(3))
    assert caplog.text.count("cannot be stored") == 1


def test_a_damaged_cache_file_is_made_anew(folder, tmp_path):
    studies = FolderStudies(folder, preset="mri", cache=tmp_path / "cache", need_reports=False)
    first = studies[0].scans[0]
    (stored,) = (tmp_path / "cache").iterdir()
    good = stored.read_bytes()
    for bad in (b"", good[:1000]):
        stored.write_bytes(bad)
        assert torch.equal(studies[0].scans[0], first) and stored.read_bytes() == good


def test_names_need_not_be_utf8(folder, tmp_path, monkeypatch):
    os.rename(os.fsencode(folder / "a"), os.fsencode(folder) + b"/Andr\xe9")
    monkeypatch.setattr(prepared, "prepare_study", lambda path, preset: PreparedStudy([torch.ones(2, 2, 2)], 1.0))
    studies = FolderStudies(folder, preset="mri", cache=tmp_path / "cache", need_reports=False)
    assert all(studies[i] is not None for i in range(3)) and len(list((tmp_path / "cache").iterdir())) == 3


def test_presets_by_guess_and_unknown_ones(folder):
    whole, *_ = prepare_study(folder / "a", "auto")
    sliced, *_ = prepare_study(folder / "a", {"mri": "mri-published-48"})
    assert len(whole[0]) != 48 and len(sliced[0]) == 48
    with pytest.raises(ValueError, match="min_slices must be at least 1"):
        FolderStudies(folder, need_reports=False, min_slices=0)
    with pytest.raises(ValueError, match="no preset named 'mir'"):
        FolderStudies(folder, preset="mir", need_reports=False)


def test_a_study_of_several_modalities_keeps_them_all(tmp_path):
    for name in ("ct lung", "ct chest", "pet"):
        volume(tmp_path / f"{name}.nii.gz", (5, 12, 10), (30.0, 30.0, 4.0))
    scans, max_value, _ = prepare_study(tmp_path)
    assert max_value == 1 and {scan.dtype for scan in scans} == {torch.float32}
    white = [(scan == 1).sum() / (scan > 0).sum() for scan in scans]
    assert white[0] > 0.5 and white[1] > 0.5 and white[2] < 0.05  # of 0 to 1000, all above 350 is white in a chest window
    assert torch.equal(prepare_study(tmp_path, "chest-ct-ragged")[0][1], scans[1])


def test_limits_of_reading_are_kept_apart(folder, tmp_path):
    """What was stored with one limit is not taken for another."""
    thin = [FolderStudies(folder, preset="mri", cache=tmp_path / "cache", need_reports=False, min_slices=n) for n in (3, 6)]
    assert thin[0][0] is not None and thin[1][0] is None
