"""What is drawn for each study depends on seed, epoch and study alone; and what replaces studies that cannot be read."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_files import volume

pytest.importorskip("open_clip")
pytest.importorskip("accelerate")

from hlip.train import loop, train
from hlip.train.config import config_from
from hlip.train.draws import Draws, mixed_seed, seeded
from hlip.train.examples import Collate, Example
from hlip.train.run import load_state

# ------------------------------------------------------------------ studies that cannot be read


class Studies:
    """Examples by number, some of which cannot be read; each with a number drawn by torch and one by numpy."""

    def __init__(self, size, broken=()):
        self.size, self.broken, self.read = size, set(broken), Counter()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read[index] += 1
        if index in self.broken:
            return None
        drawn = torch.tensor([float(torch.rand(())), float(np.random.rand())]).view(1, 1, 2)
        return Example(str(index), [drawn], ["One.", "Two.", "Three."])


def epochs_of(draws, size, batch=4, epochs=2):
    order = list(range(size))
    return [
        [e.name for e in draws.__getitems__([(epoch, i) for i in order[at : at + batch]])]
        for epoch in range(epochs)
        for at in range(0, size, batch)
    ]


def test_a_block_of_broken_studies_is_replaced_by_many_others():
    """Half of them, in a row; in no batch is a study twice."""
    draws = Draws(Studies(200, broken=range(100)), 0)
    batches = epochs_of(draws, 200)
    assert all(len(set(names)) == 4 for names in batches)
    counts = Counter(name for names in batches for name in names)
    assert min(map(int, counts)) == 100 and len(counts) == 100
    assert max(counts.values()) <= 12  # 4 each on average


def test_what_replaces_a_study_does_not_depend_on_what_was_read_before():
    whole = epochs_of(Draws(Studies(40, broken=range(10, 30)), 7), 40)
    resumed = Draws(Studies(40, broken=range(10, 30)), 7)
    assert [[e.name for e in resumed.__getitems__([(1, i) for i in range(12, 16)])]] == [whole[13]]
    assert epochs_of(Draws(Studies(40, broken=range(10, 30)), 8), 40) != whole


def test_a_study_comes_twice_before_training_ends():
    draws = Draws(Studies(4, broken=[2]), 0)
    names = [e.name for e in draws.__getitems__([(0, i) for i in range(4)])]
    assert len(names) == 4 and "2" not in names


def test_training_ends_when_a_large_share_cannot_be_read():
    studies = Studies(1000, broken=range(1, 1000))
    with pytest.raises(ValueError, match="10[01] of 1000 studies were found that cannot be read, among them all of 100 drawn"):
        Draws(studies, 0).__getitems__([(0, 0), (0, 5)])
    with pytest.raises(ValueError, match="3 of 3 studies were found that cannot be read"):
        Draws(Studies(3, broken=range(3)), 0)[0, 1]


def test_a_study_that_can_be_read_again_comes_back():
    studies = Studies(20, broken=[3])
    draws = Draws(studies, 0)
    assert draws[0, 3].name != "3" and draws.unreadable.sum() == 1
    studies.broken.clear()
    assert draws[1, 3].name == "3" and not draws.unreadable.any()


# ------------------------------------------------------------------ random numbers


def test_seeds_leave_other_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        torch.rand(1), np.random.rand()
    assert torch.equal(torch.rand(3), expected)
    assert len({mixed_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27
    assert all(0 <= mixed_seed(i) < 2**63 for i in range(1000))


def test_draws_depend_on_epoch_and_study_alone():
    texts = lambda given: torch.tensor([[ord(c) for c in f"{text:12}"[:12]] for text in given])  # noqa: E731
    collate = Collate(texts, ("sentence", "report"), "")
    drawn = {}
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for epoch in (0, 1):
            draws = Draws(Studies(4), 0)
            torch.manual_seed(len(drawn))  # whatever else was drawn
            batch = collate(draws.__getitems__([(epoch, i) for i in order]))
            for place, i in enumerate(order):
                numbers = batch.images.voxels.view(4, 2)[place].tolist()
                words = [batch.tokens[place].tolist(), batch.tokens[4 + place].tolist()]
                assert drawn.setdefault((epoch, i), (numbers, words)) == (numbers, words)
    assert len({tuple(numbers) for numbers, _ in drawn.values()}) == 8  # each its own


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("draws")
    for i in range(8):
        for j in range(1 + i % 3):
            volume(root / f"s{i}" / f"scan{j}.nii.gz", (4 + i, 24, 20), (1.0, 1.0, 2.0))
        (root / f"s{i}" / "report.txt").write_text(f"A mass is seen. No bleed. Study {i * 'x'}a is normal.\n")
    (root / "s5" / "scan0.nii.gz").write_bytes(b"broken")
    (root / "s5" / "scan1.nii.gz").unlink()
    (root / "s5" / "scan2.nii.gz").unlink()
    return root


def trained(studies, run, workers, **changes):
    """The weights after three epochs of two steps, with every random choice there is."""
    model = {"image_size": [8, 64, 64], "patch_size": [4, 32, 32], "width": 48, "heads": 2, "embed_dim": 16,
             "levels": ["slice", "study"], "patch_dropout": 0.25, "drop_path": 0.1}  # fmt: skip
    data = {"train": str(studies), "workers": workers, "preset": "mri", "max_scans": 1}
    values = {"run": str(run), "epochs": 3, "batch_size": 4, "lr": 1e-3, "data": data, "model": model, **changes}
    train(config_from(values), resume=True, progress=False)
    return load_state(run / "state.pt")


def test_workers_and_resuming_change_nothing(studies, tmp_path, monkeypatch):
    expected = trained(studies, tmp_path / "0", 0)
    for workers in (1, 2):
        assert same(trained(studies, tmp_path / str(workers), workers), expected), workers
    take = loop.Trainer.train_step
    for workers, stop in ((0, 2), (2, 2), (0, 3), (2, 3)):  # at the end of an epoch, and within one
        run = tmp_path / f"{workers}-{stop}"

        def interrupted(self, batches, stop=stop):
            if self.step == stop:
                raise KeyboardInterrupt
            return take(self, batches)

        monkeypatch.setattr(loop.Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(studies, run, workers, save_minutes=1e-9)
        assert load_state(run / "state.pt")["step"] == stop
        monkeypatch.setattr(loop.Trainer, "train_step", take)
        assert same(trained(studies, run, workers, save_minutes=1e-9), expected), (workers, stop)


def same(a, b):
    return a["step"] == b["step"] and all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
