"""Prompts, classifiers and metrics."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)
from tiny import tiny_model

from hlip.evaluate import Classifier, benchmark, classification_metrics, zero_shot_classifier
from hlip.evaluate.prompts import benchmarks, parse


def test_published_benchmarks_read_and_have_their_classes():
    counts = {name: len(benchmark(name).classes) for name in benchmarks()}
    assert counts and all(n >= 2 for n in counts.values()), counts
    for name in benchmarks():
        for prompts in (*benchmark(name).prompts.values(), *benchmark(name).against.values()):
            assert prompts and all(p.strip() and "{c}" not in p for p in prompts)


def test_the_first_chest_benchmark_has_its_published_pairs():
    chest = benchmark("ct_rate_v1")
    assert len(chest.classes) == 16 and list(chest.against) == chest.classes == benchmark("ct_rate").classes
    # Of organs' templates ("The lung shows: Nodule.") the published phrases are without "lung", of this one with it.
    for name in ("Lung nodule", "Lung opacity"):
        assert chest.prompts[name] == (f"The volume shows: {name}.",)
        assert chest.against[name] == (f"The volume shows: Not {name.lower()}.",)
    assert chest.against["Atelectasis"] == ("The volume shows: Not atelectatic.",)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({}, "classes"), ({"classes": ["a"], "tempates": []}, "tempates"), ({"classes": ["a"], "kind": "x"}, "kind"),
        ({"classes": ["a"], "templates": ["no place"]}, "no place"), ({"classes": ["a"], "plain": ["b"]}, "b"), ([], "classes"),
    ],
)  # fmt: skip
def test_bad_prompt_files_are_explained(entry, words):
    with pytest.raises(ValueError, match=words):
        parse("mine", entry)


def test_prompt_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: multiclass\nclasses: {a: [one, two], b: three}\nplain: [b]\ntemplates: ['X {c}.', 'Y {c}.']\n")
    mine = benchmark(path)
    assert mine.name == "mine" and mine.classes == ["a", "b"]
    assert mine.prompts["a"] == ("X one.", "Y one.", "X two.", "Y two.") and mine.prompts["b"] == ("X three.",)
    with pytest.raises(FileNotFoundError):
        benchmark(tmp_path / "no.yaml")
    with pytest.raises(ValueError, match="choose one of"):
        benchmark("no-such-benchmark")
    path.write_text("a: [")
    with pytest.raises(ValueError, match="YAML"):
        benchmark(path)
    path.write_text("classes: [Ödem]", encoding="utf-16")
    assert benchmark(path).prompts == {"Ödem": ("This study shows: Ödem.",)}
    path.write_text("classes: {a: x}\ntemplates: 'X {c}.'\nplain: a\n")
    assert benchmark(path).prompts == {"a": ("X x.",)}


@pytest.mark.parametrize(
    "text, words",
    [
        ("classes: hemorrhage", "classes must be a list of names, or a mapping of names to phrases, got the text 'hemorrhage'"),
        ("classes: {a: [], b: x}", "classes: a must be text or a list of texts, got the list []"),
        ("classes: {a: }", "classes: a must be text or a list of texts, got nothing"),
        ("classes: {a: 1}", "classes: a must be text or a list of texts, got the number 1"),
        ("classes: {a: ['']}", "classes: a: entry 1 must be text, got an empty one"),
        ("classes: {a: [[x, y]]}", "classes: a: entry 1 must be text, got the list ['x', 'y']"),
        ("classes: {1: x}", "classes: the name must be text, got the number 1; put it in quotation marks"),
        ("classes: [yes, no]", "classes: entry 1 must be text, got yes or no (True); put it in quotation marks"),
        ("classes: [{a: x}]", "classes: entry 1 must be text, got the mapping {'a': 'x'}"),
        ("classes: [a, b, a]", "classes: 'a' is there twice"),
        ("classes: 3", "classes must be a list of names"),
        ("classes: [a]\ntemplates: [1]", "templates: entry 1 must be text, got the number 1"),
        ("classes: [a]\ntemplates: []", "templates must be text or a list of texts, got the list []"),
        ("classes: [a]\ntemplates: {x: y}", "templates must be text or a list of texts, got the mapping {'x': 'y'}"),
        ("classes: [a]\nplain: mass", "'plain' names ['mass'], which are no classes"),
        ("classes: [a]\nplain: {a: 1}", "plain must be text or a list of texts"),
        ("classes: [a]\nkind: [x]", "kind must be 'multilabel' or 'multiclass'"),
        ("classes: [a]\n1: b\nc: d", "unknown entries 'c', 1"),
        ("classes: [a\n", "not readable as YAML"),
        ("[" * 5000, "not readable as YAML"),
        ("classes: &a [*a]", "classes: entry 1 must be text"),
        ("classes: [a]\nagainst: no a", "against 'no a' lacks {c}, the place of the class phrase"),
        (
            "classes: [a]\nagainst: [no a]",
            "against must be a text with {c}, or a mapping of all classes to phrases, got the list",
        ),
        ("classes: [a, b]\nagainst: {a: x}", "against lacks 'b': it must have the names of 'classes'"),
        ("classes: [a]\nagainst: {a: x, c: y}", "against names 'c', which is no class"),
        ("classes: [a]\nagainst: {a: 1}", "against: a must be text or a list of texts, got the number 1"),
        ("classes: [a]\nkind: multiclass\nagainst: 'no {c}'", "against: classes of kind multiclass are scored against each"),
    ],
)
def test_prompt_files_of_the_wrong_shape_are_one_line(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        benchmark(path)
    assert words in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


class Words:
    """A tokenizer of one id per character."""

    def __call__(self, texts):
        width = max(map(len, texts))
        return torch.tensor([[ord(c) % 190 + 5 for c in t] + [0] * (width - len(t)) for t in texts])


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_a_class_is_the_mean_of_its_normalised_prompts(kind):
    model = tiny_model().train()
    entry = {"kind": kind, "classes": {"a": ["one", "two"], "b": "six"}, "templates": ["{c}", "x{c}"]}
    classifier = zero_shot_classifier(model, Words(), parse("t", entry), batch_size=3)
    assert model.training
    model.eval()
    with torch.no_grad():
        f = [model.encode_text(Words()([p]), normalize=True)[0] for p in ("one", "xone", "two", "xtwo", "six", "xsix")]
    for row, part in zip(classifier.weights, (f[:4], f[4:]), strict=True):
        mean = torch.stack(part).mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    images = torch.randn(3, 2, 24)
    cosine = torch.nn.functional.normalize(images[:, 0], dim=-1) @ classifier.weights.T
    scores = classifier.scores(images)
    expected = torch.softmax(float(model.logit_scale.exp().detach()) * cosine, -1) if kind == "multiclass" else cosine
    torch.testing.assert_close(scores.float(), expected)


@pytest.mark.parametrize("against", ["no {c}", {"a": ["no one", "no two"], "b": "no six"}])
def test_a_class_is_scored_against_its_denial(against):
    model = tiny_model().eval()
    entry = {"classes": {"a": ["one", "two"], "b": "six"}, "templates": ["{c}", "x{c}"], "against": against}
    classifier = zero_shot_classifier(model, Words(), parse("t", entry), batch_size=3)
    denied = parse("t", {"classes": {"a": ["no one", "no two"], "b": "no six"}, "templates": entry["templates"]})
    images = torch.randn(3, 24)
    both = [c.cosine(images) for c in (classifier, zero_shot_classifier(model, Words(), denied))]
    scale = float(model.logit_scale.exp().detach())
    torch.testing.assert_close(classifier.scores(images).float(), torch.softmax(scale * torch.stack(both), 0)[0])


@pytest.mark.parametrize("entry", [{"classes": ["a"], "against": "no {c}"}, {"classes": ["a", "b"], "kind": "multiclass"}])
def test_scores_near_one_are_still_ranked(entry):
    benchmark, a, b = parse("t", entry), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    weights, against = (a, b) if "against" in entry else (torch.cat([a, b]), None)
    angles = torch.linspace(0.56, 0.66, 20)  # all of them much nearer to a
    images = torch.stack([angles.cos(), angles.sin()], 1)
    scores = Classifier(benchmark, weights, 100.0, against).scores(images)[:, 0].numpy()
    assert roc_auc_score([1] * 10 + [0] * 10, scores) == 1.0 and len(set(scores)) == 20


def test_multiclass_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    scores, labels = rng.random((60, 3)), np.eye(3)[y]
    metrics = classification_metrics(scores, labels, ["a", "b", "c"], "multiclass")
    assert metrics.macro_auc == pytest.approx(np.mean([roc_auc_score(y == c, scores[:, c]) for c in range(3)]))
    assert metrics.macro_balanced_accuracy == pytest.approx(balanced_accuracy_score(y, scores.argmax(1)))
    assert sum(metrics.positives) == 60 and "macro mean" in metrics.table()
    won = scores.argmax(1)
    assert metrics.overall == pytest.approx((accuracy_score(y, won), f1_score(y, won, average="weighted")))
    assert f"accuracy {metrics.overall[0]:.3f}, weighted F1 {metrics.overall[1]:.3f}" in metrics.table()
    assert metrics.precision == pytest.approx(precision_score(y, won, average=None))
    assert metrics.recall == metrics.balanced_accuracy == pytest.approx(recall_score(y, won, average=None))
    assert metrics.accuracy[1] == pytest.approx(accuracy_score(y == 1, won == 1)) and all(map(math.isnan, metrics.threshold))


def test_multilabel_metrics_at_the_threshold_nearest_the_corner():
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 2)) < 0.3).astype(float)
    scores = (rng.standard_normal((50, 2)) + labels).round(1)  # with ties
    metrics = classification_metrics(scores, labels, ["a", "b"])
    for c, (y, s) in enumerate(zip(labels.T, scores.T, strict=True)):

        def distance(t, y=y, s=s):
            return np.hypot((s >= t)[y == 0].mean(), 1 - (s >= t)[y == 1].mean())

        best = min(np.unique(s), key=lambda t: (distance(t).round(9), t))
        chosen = s >= best
        assert metrics.threshold[c] == best and metrics.accuracy[c] == pytest.approx(accuracy_score(y, chosen))
        assert metrics.weighted_f1[c] == pytest.approx(f1_score(y, chosen, average="weighted"))
        assert metrics.precision[c] == pytest.approx(precision_score(y, chosen))
        assert metrics.recall[c] == pytest.approx(recall_score(y, chosen))
        assert metrics.balanced_accuracy[c] >= (metrics.recall[c] + 1 - chosen[y == 0].mean()) / 2
    table = metrics.table().splitlines()
    assert table[0].split()[1:] == ["positives", "AUC", "balanced", "accuracy", "F1", "precision", "recall"]
    assert len({len(line) for line in table[:-1]}) == 1  # columns


def test_scores_that_tell_nothing_have_a_finite_threshold():
    metrics = classification_metrics(np.full((4, 1), 0.5), np.array([[0], [1], [1], [0]]), ["a"])
    assert metrics.threshold == (0.5,) and metrics.recall == (1.0,) and metrics.auc == (0.5,)


def test_multilabel_metrics_skip_unknown_labels_and_absent_classes():
    scores = np.array([[0.1, 0.5, 0.2], [0.9, 0.2, 0.1], [0.4, 0.1, 0.3], [0.8, 0.3, 0.3]])
    labels = np.array([[0, 0, 1], [1, 0, np.nan], [0, 0, 0], [1, 0, 1]])
    metrics = classification_metrics(scores, labels, ["a", "b", "c"])
    assert metrics.auc[0] == 1.0 and math.isnan(metrics.auc[1]) and metrics.auc[2] == pytest.approx(0.25)
    assert metrics.macro_auc == pytest.approx((1.0 + metrics.auc[2]) / 2) and metrics.balanced_accuracy[0] == 1.0
    assert metrics.table().count("-") >= 2


@pytest.mark.parametrize(
    "scores, labels, kind, words",
    [
        (np.zeros((2, 3)), np.zeros((2, 2)), "multilabel", "classes"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), "multilabel", "2 studies are not finite"),
        (np.zeros((2, 2)), np.full((2, 2), 2), "multilabel", "0 or 1"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "multiclass", "exactly one"),
    ],
)
def test_bad_scores_are_refused(scores, labels, kind, words):
    with pytest.raises(ValueError, match=words):
        classification_metrics(scores, labels, ["a", "b"], kind)
