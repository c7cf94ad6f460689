"""ROUGE equals the `rouge_score` package on real and on made text, and a few cases done by hand."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate import summary


def reference_score(answer: str, references: list[str]) -> dict[str, float]:
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = scorers.RougeScorer(list(summary.METRICS), use_stemmer=False)
    return {name: one.fmeasure for name, one in scorer.score_multi(references, answer).items()}


def papers(shared: Path) -> list[dict[str, Any]]:
    lines = (shared / "data" / "scitldr" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_case_by_hand() -> None:
    """Four of five words in common, one pair of four, and a subsequence of three (`the sat mat`)."""
    found = summary.score("The cat sat, on mat!", ["the mat sat on cat"])
    assert found["rouge1"] == pytest.approx(1.0)
    assert found["rouge2"] == pytest.approx(1 / 4)
    assert found["rougeL"] == pytest.approx(3 / 5)


def test_the_order_of_words_counts_for_rouge_l_only() -> None:
    found = summary.score("a b c d", ["d c b a"])
    assert found == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.25}


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("", "a b", 0.0),
        ("a b", "", 0.0),
        ("", "", 0.0),
        ("...", "!", 0.0),
        ("A-B.", "a b", 1.0),
        ("a", "a", 1.0),
    ],
)
def test_the_edges(answer: str, reference: str, expected: float) -> None:
    assert summary.score(answer, [reference])["rougeL"] == expected
    assert summary.score(answer, [reference]) == reference_score(answer, [reference])


def test_each_metric_takes_its_own_best_reference() -> None:
    references = ["b c d a", "a b x y z"]
    found = summary.score("a b c d", references)
    assert found == pytest.approx(reference_score("a b c d", references), abs=1e-12)
    assert found["rouge1"] == summary.score("a b c d", references[:1])["rouge1"]
    # The usual mistake, the mean over the references, gives less.
    mean = sum(summary.score("a b c d", [one])["rouge1"] for one in references) / 2
    assert found["rouge1"] > mean + 0.1


def test_made_pairs_equal_rouge_score() -> None:
    draw = random.Random(0)
    words = ["keep", "the", "numbers", "above", "4", "İ", "naïve", "x-1", "Sum,", "then", ".", "42nd"]
    for _ in range(400):
        texts = [" ".join(draw.choices(words, k=draw.randrange(0, 14))) for _ in range(draw.randrange(2, 6))]
        found, expected = summary.score(texts[0], texts[1:]), reference_score(texts[0], texts[1:])
        assert found == pytest.approx(expected, abs=1e-9), texts


CANDIDATES = {
    "the first sentences": lambda paper, other: ". ".join(paper["document"].split(". ")[:2]),
    "a summary of another paper": lambda paper, other: other["summaries"][0],
    "a reference, cut off": lambda paper, other: paper["summaries"][-1][: len(paper["summaries"][-1]) // 2],
    "a reference among the others": lambda paper, other: paper["summaries"][0],
    "a long answer": lambda paper, other: paper["document"],
}


@pytest.mark.parametrize("kind", CANDIDATES)
def test_real_pairs_equal_rouge_score(shared: Path, kind: str) -> None:
    """618 papers, each against all of its authors' and reviewers' summaries."""
    all_papers = papers(shared)
    assert len(all_papers) == 618 and all(len(paper["summaries"]) > 1 for paper in all_papers)
    if kind == "a long answer":
        all_papers = all_papers[::6]
    for paper, other in zip(all_papers, all_papers[1:] + all_papers[:1], strict=True):
        answer = CANDIDATES[kind](paper, other)
        found = summary.score(answer, paper["summaries"])
        assert found == pytest.approx(reference_score(answer, paper["summaries"]), rel=0, abs=1e-6), answer


@pytest.mark.parametrize(
    ("answer", "reference", "rouge1"),
    [
        ("naïve", "na ve", 1.0),  # an accent parts a word in two
        ("naïve", "naive", 0.0),
        ("ÉCOLE", "cole", 1.0),
        ("Straße", "strasse", 0.0),
        ("10 \u00b5m", "10 m", 1.0),
        ("日本語", "日本語", 0.0),  # and other scripts have no words at all
        ("Привет мир", "Привет мир", 0.0),
        ("\u212a", "k", 1.0),  # the sign of kelvin, in lower case
    ],
)
def test_other_letters_than_a_to_z_are_as_in_rouge_score(answer: str, reference: str, rouge1: float) -> None:
    found = summary.score(answer, [reference])
    assert found == pytest.approx(reference_score(answer, [reference]), abs=1e-12)
    assert found["rouge1"] == rouge1


def test_the_means_and_the_rows() -> None:
    rows = [Row(prompt="p", completion="sum the numbers"), Row(prompt="p", references=("a b", "c d"))]
    metrics, scores = summary.rouge(rows, ["Sum the numbers.", "c x"])
    assert scores == [1.0, 0.5]
    assert metrics["rougeL"] == 0.75
    assert metrics["rouge2"] == 0.5
    assert metrics["summaries"] == 2


@pytest.mark.parametrize(
    ("answer", "references", "ratio"),
    [
        ("a b c", ["x y", "x y z u"], 3 / 2),  # of two that are as near, the shorter
        ("a b c", ["x", "x y z u v w", "x y z u"], 3 / 4),
        ("", ["x y"], 0.0),
        ("日本語", ["日本", "日本語だよ"], 3 / 2),  # a character is a word where no spaces part words
        ("don't stop", ["a"], 3.0),
        ("a", ["...", "x y"], 1 / 2),
        ("a", ["..."], None),
    ],
)
def test_the_length_is_compared_with_the_nearest_reference(
    answer: str, references: list[str], ratio: float | None
) -> None:
    assert summary.length_ratio(answer, references) == ratio


@pytest.mark.parametrize(
    ("answer", "source", "rate"),
    [
        ("The cat sat on, THE mat!", "Look: the cat sat on a mat", 1 / 3),  # one run of three
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("mat the on sat cat the", "the cat sat on the mat", 0.0),  # the same words
        ("a b c d a b c d", "a b c d", 2 / 5),  # each run counts as often as it is there
        ("a b c", "a b c", None),
        ("a b c d", "", 0.0),
    ],
)
def test_four_words_in_a_row_are_copied(answer: str, source: str, rate: float | None) -> None:
    assert summary.copy_rate(answer, source) == rate


def test_what_is_copied_from_real_papers(shared: Path) -> None:
    """A sentence of the paper is copied whole, an author's summary in part, another paper's not."""
    some = papers(shared)
    rows = [Row(prompt=paper["document"], references=tuple(paper["summaries"])) for paper in some]
    copied = summary.rouge(rows, [". ".join(paper["document"].split(". ")[:2]) for paper in some])[0]
    own = summary.rouge(rows, [paper["summaries"][0] for paper in some])[0]
    other = summary.rouge(rows, [paper["summaries"][0] for paper in some[1:] + some[:1]])[0]
    assert copied["copy_rate"] == 1 and copied["unfaithful"] == 0
    assert other["copy_rate"] < 0.01 < 0.1 < own["copy_rate"] < 0.5
    assert own["length_ratio"] == 1 < copied["length_ratio"]
    assert own["unfaithful"] < 0.2 < 0.8 < other["unfaithful"]


def test_what_is_nowhere_defined_is_null_and_says_why() -> None:
    row = Row(prompt="They met in Rome.", references=("...",))
    metrics, _ = summary.rouge([row], ["They met."])
    names = {"length_ratio": "no reference has a word", "copy_rate": "no answer has 4 words"}
    names |= {"unfaithful": "no answer has a name or number"}
    assert {name: metrics[f"{name}_why"] for name in names} == names
    assert [metrics[name] for name in names] == [None] * 3
    # Where one row of two has a value, the mean is that of one row, not half of it.
    two, _ = summary.rouge(
        [row, Row(prompt="They met in Rome.", references=("a b",))], ["They met.", "So Bob"]
    )
    assert (two["unfaithful"], two["length_ratio"]) == (1.0, 1.0)
    assert "unfaithful_why" not in two and two["copy_rate"] is None


def test_references_count_before_the_completion() -> None:
    row = Row(prompt="p", completion="a b", references=("c d",))
    assert summary.rouge([row], ["a b"])[1] == [0.0]


def test_rows_without_a_reference_are_refused() -> None:
    with pytest.raises(DataError, match=r"data.jsonl:3: neither `references` nor a `completion`"):
        summary.rouge([Row(prompt="p", origin="data.jsonl:3")], ["a"])
    with pytest.raises(DataError, match="no rows with references"):
        summary.rouge([], [])


def test_hundreds_of_references_are_fast() -> None:
    draw = random.Random(0)
    words = [f"word{index}" for index in range(40)]
    rows = [
        Row(prompt="p", references=tuple(" ".join(draw.choices(words, k=20)) for _ in range(300)))
        for _ in range(50)
    ]
    answers = [" ".join(draw.choices(words, k=20)) for _ in rows]
    started = time.process_time()
    summary.rouge(rows, answers)
    assert time.process_time() - started < 5.0  # measured: 0.4 s
