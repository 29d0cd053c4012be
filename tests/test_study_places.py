"""Which folders and files are studies: sub-folders, and what tables and reports name deeper."""

import unicodedata

import pytest
from data_files import volume

pytest.importorskip("open_clip")

from hlip.data.find import NOT_FOLLOWED
from hlip.train.examples import FolderStudies
from hlip.train.places import study_places


@pytest.fixture
def folder(tmp_path):
    """BIDS sessions of two subjects, a study of one scan a folder, and a file."""
    for name in ("sub-1/ses-1/anat/T1", "sub-1/ses-2/anat/T1", "sub-2/ses-1/anat/T1", "p/T1/scan", "p/T2/scan", "flat"):
        volume(tmp_path / "studies" / f"{name}.nii.gz", (5, 20, 20), (1.0, 1.0, 4.0))
    return tmp_path / "studies"


def names(folder, *named, **options):
    return list(study_places(folder, named, **options))


def test_sub_folders_are_studies_unless_a_table_names_what_is_in_them(folder):
    assert names(folder) == ["p", "sub-1", "sub-2"]
    assert names(folder, "sub-1", "p") == ["p", "sub-1", "sub-2"]
    assert names(folder, "sub-1/ses-1", "sub-1/ses-2") == ["p", "sub-1/ses-1", "sub-1/ses-2", "sub-2"]
    assert names(folder, "sub-1/ses-2", "sub-1", "flat.nii.gz") == ["flat.nii.gz", "p", "sub-1", "sub-1/ses-2", "sub-2"]
    found = study_places(folder, ["sub-2/ses-1/anat/T1.nii.gz"])
    assert found["sub-2/ses-1/anat/T1.nii.gz"] == folder / "sub-2" / "ses-1" / "anat" / "T1.nii.gz" and "sub-2" not in found


@pytest.mark.parametrize("name", ["", ".", "..", "../studies/p", "p/../sub-1", "/etc", "{folder}/p", "absent", "p/absent",
                                  ".hidden", "p/T1/scan.nii.gz/x", "a\0b", "x" * 300])  # fmt: skip
def test_names_that_are_nowhere_below_are_passed_over(folder, name):
    (folder / ".hidden").mkdir()
    assert names(folder, name.format(folder=folder)) == ["p", "sub-1", "sub-2"]


def test_links_out_of_the_folder_are_followed_when_asked(folder, tmp_path, caplog):
    volume(tmp_path / "store" / "ses-3" / "T1.nii.gz")
    (folder / "sub-1" / "ses-3").symlink_to(tmp_path / "store" / "ses-3")
    (folder / "out").symlink_to(tmp_path / "store")
    (folder / "flat-2.nii.gz").symlink_to(tmp_path / "store" / "ses-3" / "T1.nii.gz")
    (folder / "again").symlink_to(folder / "p")
    named = ("sub-1/ses-3", "out/ses-3", "flat-2.nii.gz")
    assert names(folder, *named) == ["again", "p", "sub-1", "sub-2"]
    assert f"studies: passed over 3 links to elsewhere, {NOT_FOLLOWED}" in caplog.text  # one of them to out/ses-3
    assert names(folder, *named, follow_links=True) == [
        "again", "flat-2.nii.gz", "out/ses-3", "p", "sub-1/ses-3", "sub-2"
    ]  # fmt: skip


def test_links_to_folders_with_reports_are_followed_when_asked(folder, tmp_path, caplog):
    volume(tmp_path / "store" / "ses-3" / "T1.nii.gz")
    (tmp_path / "store" / "ses-3" / "report.txt").write_text("Mass.")
    (tmp_path / "store" / "ses-3" / "loop").symlink_to(folder)
    (folder / "sub-1" / "ses-3").symlink_to(tmp_path / "store" / "ses-3")
    (folder / "sub-1" / "ses-1" / "loop").symlink_to(folder / "sub-1")
    assert names(folder, with_reports=True) == ["p", "sub-1", "sub-2"]
    assert f"studies: passed over 1 link to elsewhere, {NOT_FOLLOWED}" in caplog.text
    assert names(folder, with_reports=True, follow_links=True) == ["p", "sub-1/ses-3", "sub-2"]


def test_a_path_is_one_name_however_it_is_written(folder, tmp_path):
    (tmp_path / "r.csv").write_text("study,report\nsub-1/ses-1/,Mass.\n./sub-1//ses-1,Bleed.\nsub-2/,Normal.\n")
    studies = FolderStudies(folder, reports=tmp_path / "r.csv")
    assert dict(zip(studies.names, studies.reports, strict=True)) == {"sub-1/ses-1": ["Mass.", "Bleed."], "sub-2": ["Normal."]}


def test_accents_are_compared_whatever_characters_they_are_made_of(folder):
    plain = unicodedata.normalize("NFC", "Zoë/früh")
    volume(folder / unicodedata.normalize("NFD", plain) / "T1.nii.gz")
    assert plain in names(folder, plain) and "Zoë" not in names(folder, plain)


def test_reports_name_their_folders(folder, caplog):
    (folder / "p" / "report.txt").write_text("Normal.")
    (folder / "p" / "T1" / "report.txt").write_text("Of a scan: the study has its own.")
    for session in ("sub-1/ses-1", "sub-1/ses-2"):
        (folder / session / "report.txt").write_text("Mass.")
    (folder / "sub-2" / ".old").mkdir()
    (folder / "sub-2" / ".old" / "report.txt").write_text("Hidden.")
    studies = FolderStudies(folder, preset="mri")
    assert studies.names == ["p", "sub-1/ses-1", "sub-1/ses-2"]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 studies have no report (report.txt in the study's folder) and are left out, e.g. sub-2"
    ]
    assert len(studies[0].scans) == 2 and studies[1].sentences == ["Mass."] and studies[1].name == "sub-1/ses-1"


def test_tables_name_theirs(folder, tmp_path, caplog):
    (tmp_path / "r.csv").write_text("study,report\nsub-1/ses-2,Mass.\nsub-2,Normal.\nflat.nii.gz,Bleed.\nsub-2/ses-9,Edema.\n")
    studies = FolderStudies(folder, reports=tmp_path / "r.csv", preset="mri", cache=tmp_path / "cache")
    assert studies.names == ["flat.nii.gz", "sub-1/ses-2", "sub-2"]
    assert [e.sentences for e in studies] == [["Bleed."], ["Mass."], ["Normal."]]
    assert [len(e.scans) for e in studies] == [len(e.scans) for e in studies] == [1, 1, 1]  # prepared, and out of the cache
    assert "1 of 4 studies that" in caplog.text and "e.g. sub-2/ses-9" in caplog.text
    assert "1 of 4 studies have no report in" in caplog.text and "e.g. p" in caplog.text


def test_a_folder_of_files_alone_needs_a_table(tmp_path):
    for i in range(2):
        volume(tmp_path / "flat" / f"s{i}.nii.gz", (5, 20, 20), (1.0, 1.0, 4.0))
    with pytest.raises(ValueError, match="no study found; .*; or a CSV whose column 'study' has the paths"):
        FolderStudies(tmp_path / "flat", need_reports=False)
    studies = FolderStudies(tmp_path / "flat", named=["s1.nii.gz"], need_reports=False, preset="mri")
    assert studies.names == ["s1.nii.gz"] and studies[0] is not None
