"""Two models are told apart where they differ, and not where they are equal; by simulation and by law.

The long simulation is benchmarks/verdict_simulation.py; here are its corners, with few pairs of models.
"""

import json
import math
import tracemalloc

import numpy as np
import pytest

from benchmarks import verdict_simulation as simulation
from mlx_distill.evaluate import statistics
from mlx_distill.evaluate.statistics import FEWEST, comparisons, intervals, paired
from mlx_distill.keys import generator

HOW = {"simulations": 500, "resamples": 400, "seed": 1}


def outcomes(problems: int, gained: int, lost: int, both: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Passes and fails: `gained` problems that only the first model passes, `lost` only the second."""
    one, other = np.zeros((2, problems))
    one[:gained] = other[gained : gained + lost] = 1
    one[gained + lost :][:both] = other[gained + lost :][:both] = 1
    return simulation.counted(one), simulation.counted(other)


def sums(purpose: str, problems: int, mean: float = 1.0) -> np.ndarray:
    random = generator(0, purpose)
    tokens = random.integers(1, 60, problems).astype(float)
    return np.stack([tokens * random.gamma(2.0, mean / 2, problems), tokens], -1)


# --- equal models ---


@pytest.mark.parametrize(
    "case",
    [
        simulation.passed(20, 0.5, 0.0),
        simulation.passed(100, 0.02, 0.5),
        simulation.passed(100, 0.9, 0.9),
        simulation.answered(50, 5, 0.0),
        simulation.overlaps(50, 0.9),
        simulation.divergences(20, 2.0),
        simulation.divergences(100, 1.0),
    ],
    ids=lambda case: f"{case.kind} {case.problems} {case.config}",
)
def test_equal_models_are_seldom_told_apart(case: simulation.Case) -> None:
    found = simulation.judge(case, **HOW)
    assert max(found.higher, found.lower) <= 0.05
    assert found.covered >= 0.93


def test_the_percentile_bootstrap_alone_would_tell_equal_models_apart() -> None:
    """The usual choice, without Student's widening and without the swaps, on the KL of 8 rows."""
    one, other = simulation.divergences(8, 1.0).draw(generator(0, "alone"), 500)
    drawn = statistics._resampled(np.concatenate([one, other]), 0, 400)
    ratio = drawn[..., 0] / drawn[..., 1]
    low = np.quantile(ratio[:, :500] - ratio[:, 500:], 0.025, axis=0)
    assert (low > 0).mean() > 0.05
    assert simulation.judge(simulation.divergences(8, 1.0), **HOW).higher <= 0.05


def test_answers_are_no_problems() -> None:
    """Ten answers to each of 30 problems taken for 300 problems: equal models differ a third of the time."""
    wrong = simulation.judge(simulation.each_answer(30, 10, 0.0), **HOW)
    right = simulation.judge(simulation.answered(30, 10, 0.0), **HOW)
    assert wrong.higher + wrong.lower > 0.2 > 0.1 > right.higher + right.lower


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (2, 0), (5, 0), (0, 5), (7, 1), (20, 9)])
def test_few_problems_of_difference_are_none(gained: int, lost: int) -> None:
    found = paired(*outcomes(300, gained, lost, 50), seed=0, passes=True)
    assert found is not None and found.low is not None and found.high is not None
    assert found.low <= 0 <= found.high
    assert found.difference == pytest.approx((gained - lost) / 300)


def test_two_problems_would_do_without_the_exact_test() -> None:
    """Five problems gained of 300 and none lost: the plain bootstrap's interval leaves out 0."""
    one, other = outcomes(300, 5, 0)
    drawn = statistics._resampled(np.stack([one, other]), 0, 10_000)[..., 0] / 300
    assert np.quantile(drawn[:, 0] - drawn[:, 1], 0.025) > 0


@pytest.mark.parametrize("problems", [1, 2, 5])
@pytest.mark.parametrize("passes", [True, False])
def test_of_few_problems_nothing_is_said(problems: int, passes: bool) -> None:
    found = paired(*outcomes(problems, problems, 0), seed=0, passes=passes)
    assert found is not None
    assert (found.low, found.high, found.stderr, found.difference) == (None, None, None, 1.0)
    assert found.p > 0.05


def test_the_fewest_problems_are_those_that_can_be_evidence() -> None:
    assert 2 * 0.5**FEWEST < 1 - statistics.LEVEL < 2 * 0.5 ** (FEWEST - 1)
    found = paired(sums("many", FEWEST) * [3, 1], sums("many", FEWEST), seed=0)
    assert found is not None and found.low is not None and found.low > 0


def test_models_that_agree_everywhere_may_still_differ_elsewhere() -> None:
    few, many = (paired(*outcomes(n, 0, 0, n // 2), seed=0, passes=True) for n in (20, 1000))
    assert few is not None and few.high is not None and many is not None and many.high is not None
    assert few.difference == many.difference == 0
    assert 3 / 1000 < 3 * many.high < few.high < 3 / 20, "about 3 in n: the rule of three"
    same = paired(sums("same", 40), sums("same", 40), seed=0)
    assert same is not None and (same.low, same.high, same.p) == (0, 0, 1)


# --- different models ---


def test_a_difference_is_found() -> None:
    found = simulation.judge(simulation.passed(300, 0.5, 0.7, 0.1), **HOW)
    assert found.higher > 0.9 and found.lower == 0 and found.covered >= 0.92


def test_unpaired_it_would_be_missed() -> None:
    real = simulation.passed(300, 0.5, 0.9, 0.06)
    assert simulation.judge(real, **HOW).higher > 0.8
    assert simulation.judge(simulation.careless(real), **HOW).higher < 0.1


# --- what the numbers are ---


@pytest.mark.parametrize(("gained", "lost"), [(3, 1), (6, 0), (9, 2), (20, 9), (40, 31)])
def test_on_passes_and_fails_p_is_mcnemars(gained: int, lost: int) -> None:
    number = gained + lost
    tail = sum(math.comb(number, k) for k in range(gained, number + 1)) / 2**number
    found = paired(*outcomes(200, gained, lost), seed=0, passes=True)
    assert found is not None
    assert found.p == pytest.approx(min(1.0, 2 * tail), abs=0.02)


def test_the_interval_is_that_of_t_where_all_is_normal() -> None:
    random = generator(0, "normal")
    one, other = (simulation.counted(random.normal(mean, 1.0, 400)) for mean in (10.0, 9.0))
    found = paired(one, other, seed=0)
    assert found is not None and found.low is not None and found.high is not None
    apart = one[:, 0] - other[:, 0]
    stderr = apart.std(ddof=1) / math.sqrt(400)
    assert found.stderr == pytest.approx(stderr, rel=0.03)
    assert (found.low, found.high) == pytest.approx(
        (apart.mean() - 1.966 * stderr, apart.mean() + 1.966 * stderr), abs=0.05 * stderr
    )


def test_of_few_problems_the_interval_is_wider() -> None:
    """The plain percentile interval of 8 problems holds the difference 87 times in 100."""
    random = generator(0, "few")
    one, other = (simulation.counted(random.normal(mean, 1.0, (1000, 8))) for mean in (2.0, 0.0))
    _, _, low, high, _ = intervals(one, other, seed=0, resamples=1000)
    assert ((low < 2) & (high > 2)).mean() > 0.92


def test_ratios_of_sums_not_means_of_ratios() -> None:
    one, other = np.array([[100.0, 100], [6, 2]] * 10), np.array([[100.0, 100], [2, 2]] * 10)
    found = paired(one, other, seed=0)
    assert found is not None and found.difference == pytest.approx(4 / 102)
    assert found.difference < np.mean(one[:, 0] / one[:, 1] - other[:, 0] / other[:, 1]) / 10


def test_counts_may_differ_between_the_models() -> None:
    """A ratio with another divisor on each side, against a bootstrap written out."""
    one, other = sums("one", 50), sums("other", 50, 2.0)
    found = paired(one, other, seed=0, resamples=4000)
    assert found is not None and found.low is not None and found.high is not None
    random = generator(3, "written out")
    drawn = []
    for _ in range(4000):
        at = random.integers(0, 50, 50)
        (a, b), (c, d) = one[at].sum(0), other[at].sum(0)
        drawn.append(a / b - c / d)
    tail = 0.5 * math.erfc(math.sqrt(50 / 49) * 2.00958 / math.sqrt(2))  # t at 49 degrees of freedom
    low, high = np.quantile(drawn, [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.05)


def test_seen_from_the_other_side_all_is_mirrored() -> None:
    one, other = sums("one", 60), sums("other", 60, 1.2)
    here, there = paired(one, other, seed=0), paired(other, one, seed=0)
    assert here is not None and here.low is not None and there is not None and there.high is not None
    assert there.difference == pytest.approx(-here.difference)
    assert there.high == pytest.approx(-here.low)
    assert there.p == pytest.approx(here.p)


@pytest.mark.parametrize(("freedom", "value"), [(5, 2.5706), (9, 2.2622), (29, 2.0452), (199, 1.9720)])
def test_students_t_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert statistics._student(freedom) == pytest.approx(value, abs=5e-4)


def test_problems_that_count_for_neither_are_left_out() -> None:
    one, other = sums("one", 30), sums("other", 30)
    empty = np.zeros((10, 2))
    found = paired(np.concatenate([empty, one]), np.concatenate([empty, other]), seed=0)
    assert found == paired(one, other, seed=0)
    assert found is not None and found.problems == 30


@pytest.mark.parametrize("named", [1, FEWEST])
def test_one_model_may_count_where_the_other_does_not(named: int) -> None:
    """Answers without a name in them have no wrong name; a resample may be without any name at all."""
    one, other = np.ones((20, 2)), np.zeros((20, 2))
    other[:named, 1] = 1
    found = paired(one, other, seed=0)
    assert found is not None and (found.problems, found.difference) == (named, 1)
    assert (found.low is None) == (named < FEWEST), "one answer is no evidence, whatever the other model has"


def test_what_cannot_be_compared_is_not() -> None:
    good, none = sums("good", 20), np.zeros((20, 2))
    infinite = good.copy()
    infinite[3, 0] = np.inf
    assert paired(good, none, seed=0) is None
    assert paired(good, infinite, seed=0) is None
    assert paired(np.zeros((0, 2)), np.zeros((0, 2)), seed=0) is None
    with pytest.raises(ValueError, match=r"the same problems twice; got \(20, 2\), \(19, 2\)"):
        paired(good, good[1:], seed=0)


def test_memory_is_bounded() -> None:
    """2000 resamples of 3000 problems at once would take 48 MB of weights, and as many of indices."""
    one, other = sums("one", 3000), sums("other", 3000)
    tracemalloc.start()
    intervals(one[None], other[None], seed=0, resamples=2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


# --- what stands in evaluation.json ---


def scores() -> dict[str, dict[str, np.ndarray]]:
    tokens = sums("tokens", 40)
    easy = np.arange(40) < 30

    def passing(right: np.ndarray) -> np.ndarray:
        return simulation.counted(right.astype(float))

    return {
        "teacher": {"pass@1": passing(easy), "nll": tokens},
        "student_before": {"pass@1": passing(easy & False), "kl": tokens * [5, 1], "nll": tokens * [5, 1]},
        "baseline": {"pass@1": passing(np.arange(40) % 2 == 0), "kl": tokens * [2, 1]},
        "student": {"pass@1": passing(easy), "kl": tokens, "nll": tokens[::-1], "mood": tokens},
        "student-4bit": {"pass@1": passing(np.arange(40) < 29), "kl": tokens * [1.5, 1], "mood": tokens},
    }


def test_comparisons_name_both_models_and_who_is_better() -> None:
    found = comparisons(scores(), seed=0)
    said = {(one["metric"], one["model"], one["other"]): one["verdict"] for one in found}
    assert said == {
        ("pass@1", "student", "teacher"): "no difference seen",
        ("pass@1", "student", "baseline"): "better",
        ("kl", "student", "baseline"): "better",  # where less is better
        ("pass@1", "student", "student_before"): "better",
        ("kl", "student", "student_before"): "better",
        ("pass@1", "student-4bit", "student"): "no difference seen",
        ("kl", "student-4bit", "student"): "worse",
        ("pass@1", "teacher", "student_before"): "better",
        ("nll", "teacher", "student_before"): "better",
    }, "no metric of one side alone, none of other tokens, none that has no better side"
    assert json.loads(json.dumps(found)) == found
    same = next(one for one in found if one["other"] == "teacher")
    assert same["low"] < 0 < same["high"], "of shares of answers that pass"
    for one in found:
        assert one["low"] <= one["difference"] <= one["high"]
        assert (one["verdict"] == "no difference seen") == (one["low"] <= 0 <= one["high"])
        assert (one["problems"], one["level"]) == (40, 0.95)


def test_a_comparison_is_the_same_whatever_else_is_compared() -> None:
    every = comparisons(scores(), seed=0)
    few = {name: {"kl": scores()[name]["kl"]} for name in ("student", "baseline")}
    (alone,) = comparisons(few, seed=0)
    assert alone in every
    assert comparisons(few, seed=1) != [alone]


def test_few_problems_are_compared_without_an_interval() -> None:
    few = {name: {"pass@1": found["pass@1"][:4]} for name, found in scores().items()}
    for one in comparisons(few, seed=0):
        assert one["verdict"] == "no difference seen"
        assert one["low"] is one["high"] is one["stderr"] is None
