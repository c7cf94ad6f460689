"""Names and numbers of an answer that its source does not have: cases by hand, and real summaries."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from mlx_distill.evaluate.faithfulness import facts, made_up, unfaithful


@pytest.mark.parametrize(
    ("text", "numbers", "names"),
    [
        ("We train FearNet in Paris.", [], ["FearNet", "Paris"]),
        ("The model. Another one! Is it? Yes: No\nNext", [], []),  # capitals of first words
        ("BERT is a model. GPT too.", [], ["BERT", "GPT"]),  # and capitals beyond the first letter
        ("It beats a human, he says. I agree with X.", [], []),  # single letters are no names
        ("CIFAR-10 and ResNet50", ["10", "50"], ["CIFAR", "ResNet"]),
        ("1,000 and 1’000 and 1\u202f000 and 1000.0", ["1000"], []),
        ("3.50 = 3.5, .5 = 0.5, 007 = 7", ["0.5", "3.5", "7"], []),
        ("5% or 5 % or 5 percent or 5 per cent", ["5%"], []),
        ("5 percentiles, 5", ["5"], []),
        ("3,5 and 12,34 and 1,2345", ["1", "12", "2345", "3", "34", "5"], []),  # no thousands
        ("in 2019. Then 20 more", ["20", "2019"], []),
        ("version 1.2.3", ["1.2", "3"], []),
        ("100" * 30, ["100" * 30], []),  # numbers of any length stay what they are
        ("a case of Ａｌｉｃｅ with ４２", ["42"], ["Alice"]),  # full width
        ("nach Zürich, в Москву", [], ["Zürich", "Москву"]),
        ("十二月 12日", ["12"], []),
        ("", [], []),
        ("... -- !?", [], []),
    ],
)
def test_the_facts_of_a_text(text: str, numbers: list[str], names: list[str]) -> None:
    found = facts(text)
    assert sorted(found.numbers) == numbers
    assert sorted(found.names) == names


@pytest.mark.parametrize(
    ("answer", "source", "missing"),
    [
        ("on CIFAR10", "cifar-10 is small", []),
        ("with GANs", "a GAN", []),
        ("a GAN", "of GANs", []),
        ("uses a GAN and CNNs", "generative adversarial networks; convolutional neural networks", []),
        ("with RL", "reinforcement learning", ["RL"]),  # of two letters the initials would be everywhere
        ("by Alice", "Bob wrote", ["Alice"]),
        ("costs 1,000", "it costs 1000 dollars", []),
        ("costs 1,000", "it costs 100 dollars", ["1000"]),
        ("in 3 steps", "three steps", []),
        ("by 5%", "by 5 points", ["5%"]),
        ("5 points", "5 % and so on", []),
        ("5 to 10 in Rome, says Bob", "Rome", ["10", "5", "Bob"]),
    ],
)
def test_what_a_source_does_not_have(answer: str, source: str, missing: list[str]) -> None:
    assert made_up(facts(answer), source) == missing


def test_the_share_counts_each_fact_once() -> None:
    source = "Alice met Bob in 1990."
    assert unfaithful("So Alice, Alice and Alice met Carol.", source) == 0.5
    assert unfaithful("met in 1990", source) == 0
    assert unfaithful("They met.", source) is None
    assert unfaithful("", source) is None
    assert unfaithful("met Alice", "") == 1


def test_a_text_is_faithful_to_itself(shared: Path) -> None:
    papers = [json.loads(line) for line in lines(shared)[:200]]
    assert all(made_up(facts(paper["document"]), paper["document"]) == [] for paper in papers)


def test_summaries_are_faithful_to_their_own_papers(shared: Path) -> None:
    """TLDRs by the authors of 618 papers; against the abstract of another paper they are made up."""
    papers = [json.loads(line) for line in lines(shared)]
    own = [unfaithful(paper["summaries"][0], paper["document"]) for paper in papers]
    other = [
        unfaithful(paper["summaries"][0], stranger["document"])
        for paper, stranger in zip(papers, papers[1:] + papers[:1], strict=True)
    ]
    assert sum(rate is not None for rate in own) > 250  # nearly every second one has a name or a number
    assert fmean(rate for rate in own if rate is not None) < 0.2
    assert fmean(rate for rate in other if rate is not None) > 0.85


def lines(shared: Path) -> list[str]:
    found = (shared / "data" / "scitldr" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(found) == 618
    return found
