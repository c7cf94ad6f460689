"""ROUGE equals the `rouge_score` package on real and on made text, and a few cases done by hand."""

import json
import math
import random
import time
from pathlib import Path

import pytest

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate import summary


def reference_score(answer: str, references: list[str]) -> dict[str, float]:
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = scorers.RougeScorer(list(summary.METRICS), use_stemmer=False)
    return {name: one.fmeasure for name, one in scorer.score_multi(references, answer).items()}


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


def test_real_pairs_equal_rouge_score(shared: Path) -> None:
    """First sentences of papers against their authors' and reviewers' summaries."""
    lines = (shared / "data" / "scitldr" / "test.jsonl").read_text().splitlines()[:300]
    assert len(lines) == 300
    for line in lines:
        paper = json.loads(line)
        answer = ". ".join(paper["document"].split(". ")[:2])
        found = summary.score(answer, paper["summaries"])
        assert found == pytest.approx(reference_score(answer, paper["summaries"]), abs=1e-9)


def test_the_means_and_the_rows() -> None:
    rows = [Row(prompt="p", completion="sum the numbers"), Row(prompt="p", references=("a b", "c d"))]
    metrics, scores = summary.rouge(rows, ["Sum the numbers.", "c x"])
    assert scores == [1.0, 0.5]
    assert metrics["rougeL"] == 0.75
    assert metrics["rouge2"] == 0.5
    assert metrics["rougeL_stderr"] == pytest.approx(math.sqrt(0.0625 / 2))
    assert metrics["summaries"] == 2


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
