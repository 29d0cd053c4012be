"""Links: followed only if asked for, by the same rule wherever studies are found and read, and told of where they are not."""

from __future__ import annotations

import logging

import pytest
from data_files import failure, reasons, volume

from hlip.data import StudyError, find_studies, read_study
from hlip.data.find import NOT_FOLLOWED, list_files
from hlip.train.examples import FolderStudies
from hlip.train.prepared import PreparedCache


@pytest.fixture
def annex(tmp_path):
    """As git-annex and DataLad lay out a data set: every file is a link to its content in a hidden folder at the top."""
    for subject in ("s1", "s2"):
        content = tmp_path / "set" / ".git" / "annex" / "objects" / subject / f"MD5-{subject}.nii.gz"
        volume(content)
        link = tmp_path / "set" / subject / "T1.nii.gz"
        link.parent.mkdir()
        link.symlink_to(content)
    return tmp_path / "set"


def test_studies_whose_files_are_links_out_of_them(annex):
    error = failure(annex / "s1")
    assert f"1 x a link that leaves the study folder: {NOT_FOLLOWED}" in str(error)
    with pytest.raises(StudyError, match="no study under .*Passed over:\n  1 x a link that leaves") as caught:
        find_studies(annex / "s1")
    assert caught.value.skipped[0].path.name == "T1.nii.gz"
    assert find_studies(annex / "s1", follow_links=True) == [annex / "s1"]
    assert [s.name for s in read_study(annex / "s1", follow_links=True).scans] == ["T1"]


def test_links_to_hidden_content_of_the_folder_itself_stay_inside(annex):
    assert find_studies(annex) == [annex / "s1", annex / "s2"]
    assert [s.name for s in read_study(annex).scans] == ["s1/T1", "s2/T1"]


def test_content_that_was_not_fetched_is_named(annex):
    for content in annex.rglob("MD5-*"):
        content.unlink()
    assert "its content has not been fetched (git-annex or DataLad: git annex get" in str(failure(annex / "s1"))


def test_folders_of_linked_studies(tmp_path, caplog):
    for patient in ("p1", "p2"):
        volume(tmp_path / "store" / patient / "T1.nii.gz")
    split = tmp_path / "split"
    split.mkdir()
    for patient in ("p1", "p2"):
        (split / patient).symlink_to(tmp_path / "store" / patient)
    with pytest.raises(StudyError) as caught:
        find_studies(split)
    assert f"2 x a link to a folder elsewhere: {NOT_FOLLOWED}" in str(caught.value)
    assert find_studies(split, follow_links=True) == [split / "p1", split / "p2"]
    assert len(read_study(split / "p1").scans) == 1  # a link that is named is followed
    volume(split / "p3" / "T1.nii.gz")
    with caplog.at_level(logging.WARNING):
        assert find_studies(split) == [split / "p3"]
    assert "2 links outside of studies, such as " in caplog.text and "/p1: a link to a folder elsewhere" in caplog.text


def test_links_in_circles_and_around_a_study_end(tmp_path):
    study, store = tmp_path / "all" / "study", tmp_path / "store"
    volume(study / "a.nii.gz")
    volume(tmp_path / "all" / "other" / "b.nii.gz")
    volume(store / "deep" / "c.nii.gz")
    (study / "around").symlink_to(tmp_path / "all")
    (study / "deep").symlink_to(store / "deep")
    (study / "store").symlink_to(store)
    (study / "again").symlink_to(store)
    (store / "back").symlink_to(store)
    (store / "home").symlink_to(study)
    files, skipped = list_files(study, follow_links=True)
    assert sorted(file.name for file in files) == ["a.nii.gz", "c.nii.gz"]
    assert any("around: a link to a folder around this study: never followed" in str(item) for item in skipped)
    assert "deep: a link to a folder elsewhere: not followed" in reasons(read_study(study))


def test_training_goes_by_the_same_rule(tmp_path, caplog):
    volume(tmp_path / "store" / "p1" / "T1.nii.gz")
    volume(tmp_path / "split" / "p2" / "T1.nii.gz")
    (tmp_path / "split" / "p1").symlink_to(tmp_path / "store" / "p1")
    with caplog.at_level(logging.WARNING):
        studies = FolderStudies(tmp_path / "split", need_reports=False)
    assert studies.names == ["p2"] and f"passed over 1 link to elsewhere, {NOT_FOLLOWED}" in caplog.text
    assert FolderStudies(tmp_path / "split", need_reports=False, follow_links=True).names == ["p1", "p2"]


def test_prepared_scans_are_made_anew_when_what_a_link_leads_to_changes(tmp_path):
    volume(tmp_path / "store" / "T1.nii.gz")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "more").symlink_to(tmp_path / "store")
    cache = PreparedCache(tmp_path / "cache", pytest.fail)
    before, *_ = cache.get(tmp_path / "study", "auto", follow_links=True)
    volume(tmp_path / "store" / "T2.nii.gz")
    after, *_ = cache.get(tmp_path / "study", "auto", follow_links=True)
    assert (len(before), len(after)) == (1, 2)
