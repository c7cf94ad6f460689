"""How often the verdict on two models is wrong when they are equal, and how often it finds a difference.

    python benchmarks/verdict_simulation.py                    # 2000 pairs a case, two minutes
    python benchmarks/verdict_simulation.py --simulations 200

Pairs of models are made up whose answers come from one distribution, and judged by
`mlx_distill.evaluate.statistics` as a run's are. `false_better_rate` gives the worst case;
`evaluate_bench.py` records it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.evaluate.statistics import FEWEST, intervals

Scores = tuple[np.ndarray, np.ndarray]  # of two models: (M, N, 2) sums and counts, M pairs of models
AT_ONCE = 250  # pairs of models judged in one call
PROBLEMS = (20, 50, 100, 200, 500)


class Case(NamedTuple):
    """A kind of data, in which two models are equal or differ by `gap`."""

    kind: str
    problems: int
    config: dict[str, Any]
    draw: Callable[[np.random.Generator, int], Scores]  # how many pairs of models
    passes: bool = False
    gap: float = 0.0


def counted(scores: np.ndarray) -> np.ndarray:
    """Scores (M, N) of problems that count once each."""
    return np.stack([scores, np.ones_like(scores)], -1)


def passed(problems: int, rate: float, alike: float, gap: float = 0.0) -> Case:
    """One answer to a problem, right or wrong.

    Args:
        alike: share of the problems on which both models do the same. gap: added to the first one's rate.
    """

    def draw(random: np.random.Generator, pairs: int) -> Scores:
        first, second, same = (random.random((pairs, problems)) for _ in range(3))
        one, other = first < rate, np.where(same < alike, first, second) < rate
        gained = ~one & (random.random((pairs, problems)) < gap / (1 - rate))
        return counted((one | gained).astype(float)), counted(other.astype(float))

    return Case("passed or failed", problems, {"rate": rate, "alike": alike, "gap": gap}, draw, True, gap)


def answered(problems: int, samples: int, alike: float) -> Case:
    """Several answers to a problem, which is as hard for both models on a share `alike` of the problems."""

    def draw(random: np.random.Generator, pairs: int) -> Scores:
        one, other = answers(random, pairs, problems, samples, alike)
        return counted(one.mean(-1)), counted(other.mean(-1))

    return Case("several answers", problems, {"samples": samples, "alike": alike}, draw, True)


def answers(
    random: np.random.Generator, pairs: int, problems: int, samples: int, alike: float
) -> tuple[np.ndarray, np.ndarray]:
    """0 or 1 for each of `samples` answers to each problem, (M, N, samples) twice."""
    first, second = (random.beta(0.5, 0.5, (pairs, problems)) for _ in range(2))
    second = np.where(random.random((pairs, problems)) < alike, first, second)
    drawn = (random.random((pairs, problems, samples)) for _ in range(2))
    one, other = (u < rate[..., None] for u, rate in zip(drawn, (first, second), strict=True))
    return one.astype(float), other.astype(float)


def overlaps(problems: int, ties: float) -> Case:
    """Scores between 0 and 1, such as ROUGE: a share `ties` of the answers the same, and some 0."""

    def draw(random: np.random.Generator, pairs: int) -> Scores:
        first, second = (random.beta(1.0, 2.0, (pairs, problems)) for _ in range(2))
        first, second = (np.where(x < 0.1, 0.0, x) for x in (first, second))
        second = np.where(random.random((pairs, problems)) < ties, first, second)
        return counted(first), counted(second)

    return Case("ROUGE", problems, {"ties": ties}, draw)


def divergences(problems: int, tail: float, other_tail: float | None = None, gap: float = 0.0) -> Case:
    """KL summed over the tokens of rows of 3 to 120 of them; its mean over tokens is 1 nat for both.

    Args:
        tail: standard deviation of the logarithm of a row's KL; half of its variance is the row's,
            the other half each model's own. other_tail: of the other model, whose rows then are its own:
            the two are equal in the mean alone. gap: share by which the first one's mean is higher.
    """

    def draw(random: np.random.Generator, pairs: int) -> Scores:
        shape = (pairs, problems)
        tokens = random.integers(3, 121, shape).astype(float)
        row = random.standard_normal(shape)

        def mean(sigma: float, shared: bool) -> np.ndarray:
            z = random.standard_normal(shape)
            z = (z + row) / np.sqrt(2) if shared else z
            return np.exp(sigma * z - sigma**2 / 2)

        shared = other_tail is None
        one, other = mean(tail, shared), mean(tail if other_tail is None else other_tail, shared)
        return np.stack([tokens * one * (1 + gap), tokens], -1), np.stack([tokens * other, tokens], -1)

    kind = "KL" if other_tail is None else "KL, equal in the mean alone"
    return Case(kind, problems, {"tail": tail, "other_tail": other_tail, "gap": gap}, draw, gap=gap)


def equal_models() -> list[Case]:
    """The cases in which no difference must be seen."""
    cases = [passed(n, rate, 0.0) for n in (1, 2, 5, FEWEST, 10) for rate in (0.1, 0.5, 0.9)]
    for n in PROBLEMS:
        for rate in (0.02, 0.1, 0.5, 0.9, 0.98):
            cases += [passed(n, rate, alike) for alike in (0.0, 0.5, 0.9, 0.99, 1.0)]
        cases += [answered(n, 5, alike) for alike in (0.0, 0.5, 1.0)]
        cases += [overlaps(n, ties) for ties in (0.0, 0.9)]
        cases += [divergences(n, tail) for tail in (0.5, 1.0, 2.0)]
    return cases


def different_models() -> list[Case]:
    """The cases in which a difference should be found."""
    cases = []
    for n in (50, 164, 300, 974):
        cases += [passed(n, 0.5, 0.7, gap) for gap in (0.02, 0.05, 0.1, 0.2)]
    return [*cases, *(divergences(n, 1.0, gap=gap) for n in (50, 300) for gap in (0.1, 0.3))]


def unlike_models() -> list[Case]:
    """The cases that break the rule: means are equal, but one model's sum hangs on its few worst rows."""
    return [divergences(n, tail, 0.3) for n in (20, 100, 300) for tail in (0.5, 1.0, 2.0)]


def careless(case: Case) -> Case:
    """The same models, as if they had answered different problems: the usual mistake of an unpaired test."""

    def draw(random: np.random.Generator, pairs: int) -> Scores:
        one, other = case.draw(random, pairs)
        return one, other[:, random.permutation(case.problems)]

    return case._replace(kind=f"{case.kind}, unpaired", draw=draw)


def each_answer(problems: int, samples: int, alike: float) -> Case:
    """As `answered`, each answer taken for a problem of its own: the usual mistake with several answers."""

    def draw(random: np.random.Generator, pairs: int) -> Scores:
        one, other = answers(random, pairs, problems, samples, alike)
        return counted(one.reshape(pairs, -1)), counted(other.reshape(pairs, -1))

    config = {"problems": problems, "samples": samples, "alike": alike}
    return Case("each answer a problem", problems * samples, config, draw, True)


def mistakes() -> list[Case]:
    """What the product does not do, and why: the first hides a difference, the second makes one up."""
    real = passed(300, 0.5, 0.9, 0.04)
    return [real, careless(real), answered(50, 5, 0.0), each_answer(50, 5, 0.0)]


class Found(NamedTuple):
    """Shares of the pairs of models."""

    higher: float  # the first one was told to be so
    lower: float
    covered: float  # the interval holds the true difference


def judge(case: Case, *, simulations: int, resamples: int, seed: int, number: int = 0) -> Found:
    """What is said of so many pairs of models. `number` tells the cases' random numbers apart."""
    random = np.random.default_rng([seed, number])
    higher = lower = covered = 0
    for size in chunks(simulations):
        one, other = case.draw(random, size)
        if case.problems < FEWEST:  # `paired` gives these no interval
            covered += size
            continue
        how: dict[str, Any] = {"seed": seed, "resamples": resamples, "passes": case.passes}
        _, _, low, high, _ = intervals(one, other, **how)
        higher, lower = higher + (low > 0).sum(), lower + (high < 0).sum()
        covered += ((low <= case.gap + 1e-12) & (high >= case.gap - 1e-12)).sum()
    return Found(*(float(n / simulations) for n in (higher, lower, covered)))


def chunks(simulations: int) -> Iterator[int]:
    for start in range(0, simulations, AT_ONCE):
        yield min(AT_ONCE, simulations - start)


def false_better_rate(simulations: int = 2000, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The line `false_better_rate` of the results: the worst case of all, for better and worse alike."""
    worst: dict[str, dict[str, Any]] = {}
    cases = equal_models()
    for number, case in enumerate(cases):
        found = judge(case, simulations=simulations, resamples=resamples, seed=seed, number=number)
        share = max(found.higher, found.lower)
        if case.kind not in worst or share > worst[case.kind]["share"]:
            worst[case.kind] = {"share": share, "problems": case.problems, "case": case.config}
    return {
        "name": "false_better_rate",
        "value": max(at["share"] for at in worst.values()),
        "unit": "share of pairs of equal models called better (or worse), the worst case",
        "config": {
            "cases": len(cases),
            "simulations": simulations,
            "resamples": resamples,
            "seed": seed,
            "worst": worst,
        },
    }


def table(title: str, cases: list[Case], **how: int) -> None:
    print(f"\n{title}\n\n| data | problems | | higher % | lower % | covered % |\n|---|---|---|---|---|---|")
    for number, case in enumerate(cases):
        found = (f"{100 * value:.1f}" for value in judge(case, number=number, **how))
        config = ", ".join(f"{key} {value:g}" for key, value in case.config.items() if value is not None)
        print(f"| {case.kind} | {case.problems} | {config} | {' | '.join(found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=2000, help="pairs of models of each case")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    how = vars(arguments)
    table("Equal models", equal_models(), **how)
    table("Different models", different_models(), **how)
    table("Equal in the mean alone", unlike_models(), **how)
    table("Usual mistakes, each below what it should be", mistakes(), **how)
    print(json.dumps(false_better_rate(**how)))


if __name__ == "__main__":
    sys.exit(main())
