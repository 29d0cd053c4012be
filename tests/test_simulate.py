"""Simulated studies: repeatable, disjoint, visible where they should be, and leaking nothing but through the voxels."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("nilearn")

from hlip.data import prepare, read_study
from hlip.simulate import CLASSES, SimulatedStudies, simulated_benchmark, write_study
from hlip.simulate.contrast import LESION_SIGNAL, PROTOCOLS, SIGNAL
from hlip.simulate.study import render_scan

SMALL = {"image_size": 32, "max_scans": 4, "max_slices": 10}


def test_a_study_depends_on_seed_split_and_number_alone():
    a, b = SimulatedStudies(8, **SMALL), SimulatedStudies(3, **SMALL)
    for i in (2, 0):
        one, two = a[i], b[i]
        assert one.sentences == two.sentences and one.names == two.names and one.finding == two.finding == a.finding(i)
        assert all(torch.equal(x, y) for x, y in zip(one.scans, two.scans, strict=True))
    for other in (SimulatedStudies(8, split="test", **SMALL), SimulatedStudies(8, seed=1, **SMALL)):
        assert all(
            [s.shape for s in other[i].scans] != [s.shape for s in a[i].scans]
            or not torch.equal(other[i].scans[0], a[i].scans[0])
            for i in range(3)
        )


def test_rendering_ahead_in_processes_changes_nothing():
    a, b = SimulatedStudies(5, **SMALL), SimulatedStudies(5, **SMALL)
    b.render_all(processes=2)
    for i in range(5):
        assert all(torch.equal(x, y) for x, y in zip(a[i].scans, b[i].scans, strict=True))
        assert b[i] is b[i]


def test_studies_are_ragged_and_within_bounds():
    studies = SimulatedStudies(60, min_scans=2, max_scans=5, min_slices=6, max_slices=20)
    plans = [studies.plan(i) for i in range(60)]
    assert {len(p.scans) for p in plans} == {2, 3, 4, 5}
    slices = {s.slices for p in plans for s in p.scans}
    assert min(slices) >= 6 and max(slices) <= 20 and len(slices) > 10
    assert {s.plane for p in plans for s in p.scans} == {"axial", "coronal", "sagittal"}
    assert {s.contrast for p in plans for s in p.scans} == set(SIGNAL)
    assert {p.finding for p in plans} == set(CLASSES)


def test_every_protocol_shows_every_finding():
    for protocol in PROTOCOLS:
        for finding, looks in LESION_SIGNAL.items():
            assert set(protocol) & set(looks), (protocol, finding)


@pytest.mark.parametrize("finding", [c for c in CLASSES if c != "normal"])
def test_a_lesion_changes_the_contrasts_that_show_it_and_only_near_itself(finding):
    studies = SimulatedStudies(12, findings=(finding,), **SMALL)
    shown = 0
    for i in range(12):
        plan = studies.plan(i)
        healthy = SimulatedStudies(12, findings=(finding,), **SMALL).plan(i)
        healthy = type(healthy)(**{**healthy.__dict__, "lesion": None})
        for scan in plan.scans:
            rng = np.random.default_rng(0)
            voxels, mask = render_scan(plan, scan, 32, rng, artefacts=False)
            plain, none = render_scan(healthy, scan, 32, np.random.default_rng(0), artefacts=False)
            assert not none.any()
            if scan.contrast not in LESION_SIGNAL[finding]:
                assert torch.equal(voxels, plain)
            elif mask.any():
                inside = (voxels[mask].float() - plain[mask].float()).abs().mean()
                outside = (voxels[~mask].float() - plain[~mask].float()).abs().mean()
                shown += 1
                assert inside > 20 and inside > 5 * outside, (finding, scan.contrast, inside, outside)
    assert shown >= 12


def test_every_sick_study_shows_its_finding_and_no_healthy_one_has_a_mask():
    studies = SimulatedStudies(40, **SMALL)
    for i in range(40):
        study = studies[i]
        assert any(study.visible) == (study.finding != "normal"), i
        assert any(m.any() for m in study.lesion_masks) == (study.finding != "normal")


def test_nothing_but_the_voxels_tells_the_finding():
    """A classifier on everything else (scans, contrasts, planes, slices, nuisances) must stay at chance."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score

    studies = SimulatedStudies(2000, **SMALL)
    plans = [studies.plan(i) for i in range(2000)]
    rows = [
        [len(p.scans), len(p.spots), p.atrophy, p.motion, *np.ravel(p.pose)]
        + [sum(s.contrast == c for s in p.scans) for c in SIGNAL]
        + [sum(s.plane == plane for s in p.scans) for plane in ("axial", "coronal", "sagittal")]
        + [sum(s.slices for s in p.scans), max(s.slices for s in p.scans)]
        for p in plans
    ]
    x, y = np.array(rows, dtype=float), np.array([CLASSES.index(p.finding) for p in plans])
    forest = RandomForestClassifier(200, random_state=0, min_samples_leaf=5).fit(x[:1000], y[:1000])
    scores = forest.predict_proba(x[1000:])
    auc = np.mean([roc_auc_score(y[1000:] == c, scores[:, c]) for c in range(4)])
    assert auc < 0.56, auc


def test_reports_speak_of_the_finding_in_many_words():
    studies = SimulatedStudies(400)
    words = {
        "hemorrhage": r"hemorrhage|hematoma|bleed", "infarct": r"infarct|stroke|ischemi", "mass": r"mass|tumor|neoplasm|lesion",
        "normal": r"normal|unremarkable|no (acute|significant)",
    }  # fmt: skip
    texts = {c: set() for c in CLASSES}
    for i in range(400):
        plan = studies.plan(i)
        assert 2 <= len(plan.sentences) <= 8
        assert any(re.search(words[plan.finding], s.lower()) for s in plan.sentences), plan.sentences
        texts[plan.finding].update(plan.sentences)
    assert all(len(t) > 20 for t in texts.values())
    assert studies.all_sentences(2) == [s for i in range(2) for s in studies.plan(i).sentences]
    assert set(simulated_benchmark().classes) == set(CLASSES)


def test_files_come_back_as_they_were(tmp_path):
    study = SimulatedStudies(4, **SMALL)[1]
    write_study(study, tmp_path / "s")
    assert (tmp_path / "s" / "report.txt").read_text().splitlines() == study.sentences
    again = read_study(tmp_path / "s")
    assert len(again.scans) == len(study.scans)
    for scan, voxels, name, spacing in zip(again.scans, study.scans, study.names, study.spacings, strict=True):
        (prepared,) = prepare(scan, "mri")
        plane = name.split()[0]
        assert prepared.plane == plane and prepared.voxels.shape[0] == voxels.shape[0]
        assert prepared.spacing[0] == pytest.approx(spacing[0], rel=1e-3)
        # Orientation is kept: shrunk to the size it came from, the prepared scan (the inner 14/16 of the picture) looks like
        # the original.
        small = torch.nn.functional.interpolate(prepared.voxels[:, None].float(), size=(28, 28), mode="area")
        original = voxels[:, 2:30, 2:30].float()
        a, b = small.flatten() - small.mean(), original.flatten() - original.mean()
        assert float(a @ b / (a.norm() * b.norm())) > 0.9, name


def test_bad_arguments_are_refused():
    for changes in (
        {"split": "valid"},
        {"findings": ("flu",)},
        {"min_scans": 1},
        {"min_slices": 9, "max_slices": 3},
        {"findings": ()},
    ):
        with pytest.raises(ValueError):
            SimulatedStudies(4, **changes)
    with pytest.raises(IndexError):
        SimulatedStudies(4)[4]
