"""Reports as sentences, and the tables and text files that people bring."""

import logging
import unicodedata

import pytest
from data_files import volume

pytest.importorskip("open_clip")

from hlip.text_file import read_text
from hlip.train.examples import FolderStudies
from hlip.train.sentences import split_sentences
from hlip.train.tables import read_labels, read_reports


@pytest.mark.parametrize(
    "report, sentences",
    [
        # plain text
        ("Small bleed, 3.5 mm.  No mass.\nNormal vessels.", ["Small bleed, 3.5 mm.", "No mass.", "Normal vessels."]),
        ("FINDINGS: Small bleed. No mass.", ["FINDINGS: Small bleed.", "No mass."]),
        ("Edema? Yes; Some. no more", ["Edema?", "Yes; Some. no more"]),
        ("A shift of approx. 4 mm. A nodule of segment 2. No mass.",
         ["A shift of approx. 4 mm.", "A nodule of segment 2.", "No mass."]),
        ("Consistent with MS. No new lesion on MR. Unchanged.", ["Consistent with MS.", "No new lesion on MR.", "Unchanged."]),
        ("Pas de saignement. Épaississement méningé. œdème.", ["Pas de saignement.", "Épaississement méningé. œdème."]),
        ("Норма. Отёк мозга. Ödem.", ["Норма.", "Отёк мозга.", "Ödem."]),
        # numbered impressions
        ("1. No acute intracranial hemorrhage.\n2. Chronic small vessel disease.\n3. Old right MCA infarct.",
         ["No acute intracranial hemorrhage.", "Chronic small vessel disease.", "Old right MCA infarct."]),
        ("IMPRESSION:\r\n1. Mild atrophy. 2. Stable 3.5 cm mass, grade 2. 3. Old infarct.",
         ["Mild atrophy.", "Stable 3.5 cm mass, grade 2.", "Old infarct."]),
        ("IMPRESSION: 1) no bleed; 2) chronic disease.", ["no bleed;", "chronic disease."]),
        ("(1) Mass.\n2.Bleed.\na) old infarct\n12. Edema.\n\n", ["Mass.", "Bleed.", "old infarct", "Edema."]),
        ("- No mass\n• Bleed\n* Edema\n-Cyst\n- 1. Shift", ["No mass", "Bleed", "Edema", "Cyst", "Shift"]),
        # no markers
        ("(L) MCA infarct.\n-5 HU fat.\n3.5 cm mass.", ["(L) MCA infarct.", "-5 HU fat.", "3.5 cm mass."]),
        ("Seen by Dr. Smith. Dr. J. Doe agrees. Old vs. New bleed.",
         ["Seen by Dr. Smith.", "Dr. J. Doe agrees.", "Old vs. New bleed."]),
        # nothing said
        ("FINDINGS:\n1.\n____\n12/3\n-\n", []), ("", []),
    ],
)  # fmt: skip
def test_reports_as_sentences(report, sentences):
    assert split_sentences(report) == sentences


def test_long_reports_take_no_longer_than_they_are():
    assert len(split_sentences("No mass seen. " * 50_000)) == 50_000
    assert split_sentences("1. - " * 50_000) == []


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_names_with_accents_meet_however_they_are_written(tmp_path, on_disk, in_table, caplog):
    folder, table = (unicodedata.normalize(form, "Zoë-Ødegård") for form in (on_disk, in_table))
    volume(tmp_path / "studies" / folder / "t1.nii.gz", (5, 20, 20), (1.0, 1.0, 4.0))
    (tmp_path / "r.csv").write_text(f"study,report\n{table},Normal.\n", encoding="utf-8")
    (tmp_path / "l.csv").write_text(f"study,mass\n{table},1\n", encoding="utf-8")
    studies = FolderStudies(tmp_path / "studies", reports=tmp_path / "r.csv", preset="mri")
    assert studies.names == list(read_labels(tmp_path / "l.csv", ["mass"])) == ["Zoë-Ødegård"] and not caplog.text
    assert studies[0].sentences == ["Normal."] and studies[0].name == "Zoë-Ødegård"


def test_reports_of_no_study_are_told_in_one_line(tmp_path, caplog):
    (tmp_path / "studies" / "a").mkdir(parents=True)
    (tmp_path / "r.csv").write_text("study,report\na,Normal.\nb,Mass.\nc,Bleed.\nc,Edema.\n")
    FolderStudies(tmp_path / "studies", reports=tmp_path / "r.csv")
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 3 studies that {tmp_path / 'r.csv'} has reports for are not in {tmp_path / 'studies'}, e.g. b"
    ]


# ------------------------------------------------------------------ CSV files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_decoded_by_its_mark(encoding, tmp_path):
    (tmp_path / "r.csv").write_text('report,study,age\n"Ödem, klein.",b,3\n', encoding=encoding)
    assert read_reports(tmp_path / "r.csv") == {"b": ["Ödem, klein."]}


@pytest.mark.parametrize("content", ["Ödem".encode("latin-1"), "Oedem".encode("utf-16-le"), b"\xff\xfea"])
def test_other_text_is_refused(content, tmp_path):
    (tmp_path / "r.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"r.txt: not .*save it as UTF-8"):
        read_text(tmp_path / "r.txt")


@pytest.mark.parametrize(
    "text, words",
    [
        ("report,study\nBleed.\n", "r.csv, line 2: no study is named"),
        ("study,report\na,No bleed, no mass.\n", "r.csv, line 2: 3 fields, but the header has 2"),
        ('study,report\na,"Bleed.\nb,Mass.\n', "r.csv, line 3: not readable as CSV"),
        (f"study,report\na,{'x' * 140000}\n", "r.csv, line 2: not readable as CSV"),
        ("study,report,report\na,b,c\n", "r.csv: has twice the column"),
        ("", "found none"),
    ],
)
def test_reports_that_do_not_fit_are_named_by_line(text, words, tmp_path):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_reports(tmp_path / "r.csv")


def test_empty_rows_and_cells_are_fine(tmp_path):
    (tmp_path / "r.csv").write_text(' study , report\n\n a ,"One.\n2. Two."\n,,\nb\n')
    assert read_reports(tmp_path / "r.csv") == {"a": ["One.", "Two."], "b": []}


def test_rows_of_one_study_complete_each_other_or_are_refused(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("mass,study,bleed\n1,a,\n,a,0\n1,a,0\n")
    assert read_labels(path, ["bleed", "mass"]) == {"a": [0.0, 1.0]}
    path.write_text("mass,study,bleed\n1,a,\n1,b,0\n,a,0\n0,a,0\n")
    with pytest.raises(ValueError, match="lines 2 and 5: study 'a' has both 1 and 0 for 'mass'"):
        read_labels(path, ["bleed", "mass"])
    path.write_text("mass,study\n1\n")
    with pytest.raises(ValueError, match="line 2: no study"):
        read_labels(path, ["mass"])


# ------------------------------------------------------------------ report.txt


def test_a_report_in_another_encoding_leaves_its_study_out(tmp_path, caplog):
    for name, report in (("a", "Ödem."), ("b", "Mass."), ("c", "")):
        volume(tmp_path / name / "s.nii.gz", (4, 8, 8))
        (tmp_path / name / "report.txt").write_bytes(report.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert FolderStudies(tmp_path).names == ["b"]
    assert caplog.text.count("WARNING") == 1 and "2 of 3 studies" in caplog.text and "save it as UTF-8" in caplog.text
    caplog.clear()
    assert len(FolderStudies(tmp_path, need_reports=False)) == 3 and not caplog.text
