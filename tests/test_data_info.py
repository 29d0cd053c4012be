"""``hlip info`` shows every study that it can, whatever is wrong with the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import volume

pytest.importorskip("open_clip")

from hlip.cli import main


def test_a_study_that_cannot_be_prepared_does_not_end_the_list(tmp_path, capsys):
    volume(tmp_path / "a" / "wide.nii.gz", (40, 40, 40), (900.0, 900.0, 900.0))
    volume(tmp_path / "b" / "t1.nii.gz", (7, 40, 36), (1.0, 1.0, 4.0))
    assert main(["info", str(tmp_path), "--preset", "chest-ct"]) == 1
    out, err = capsys.readouterr()
    assert "/a cannot be prepared: wide: a scan of 40 x 40 x 40 voxels of 900 x 900 x 900 mm is too large" in err
    assert out.count("tokens in all") == 1 and "/b: 1 scan" in out
    assert main(["info", str(tmp_path), "--preset", "brain"]) == 1
    assert "no preset named 'brain': choose one of auto, mri, " in capsys.readouterr().err


def test_scans_of_another_modality_are_named(tmp_path, capsys):
    for name in ("ct lung", "ct chest", "pet"):
        volume(tmp_path / f"{name}.nii.gz", (5, 12, 10), (30.0, 30.0, 4.0))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "prepared as 'chest-ct-ragged': the name says \"ct\"" in out and out.count("values as for") == 1
    assert "pet: prepared as 'chest-ct-ragged, values as for mri': no modality in the file, and no values like" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_seen_enough_ends_it_quietly(tmp_path, unbuffered):
    for i in range(3):
        volume(tmp_path / f"s{i}" / "t1.nii.gz", (7, 40, 36), (1.0, 1.0, 4.0))
    read, write = os.pipe()
    os.close(read)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONUNBUFFERED"] = unbuffered
    found = subprocess.run(
        [sys.executable, "-m", "hlip", "info", str(tmp_path)], stdout=write, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (141, "")


def test_follow_links(tmp_path, capsys):
    volume(tmp_path / "store" / "t1.nii.gz", (7, 40, 36), (1.0, 1.0, 4.0))
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "p1").symlink_to(tmp_path / "store")
    assert main(["info", str(tmp_path / "split")]) == 1
    assert "1 x a link to a folder elsewhere: not followed (follow_links does: --follow-links" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "split"), "--follow-links"]) == 0
    assert "392 tokens in all" in capsys.readouterr().out
