"""The verdict says what the numbers say: no more, no less, and never that one is better without its error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measured import MODELS

from mlx_distill.evaluate.statistics import comparisons
from mlx_distill.keys import generator
from mlx_distill.metrics import METRICS, SCORES
from mlx_distill.run_record import read_run
from mlx_distill.verdict import verdict
from mlx_distill.verdict.words import fine, is_its_own_teacher, read

PRUNED = {
    **MODELS,
    "student_before": {
        **MODELS["student_before"],
        "pass@1": 0.031,
        "kl": 2.5,
        "weights_before_pruning": 393216,
    },
}


SMALLER = {
    f"student-{name}": {**MODELS["student-4bit"], "size_mib": size, "pass@1": score}
    for name, size, score in (("3bit", 0.19, 0.61), ("mxfp4", 0.22, 0.84), ("8bit", 0.4, 0.879))
}


def test_the_verdict_says_what_the_numbers_say():
    lines = verdict(MODELS)
    assert lines[0] == (
        "The student keeps 92 % of the teacher's pass@1 at 19 % of its parameters: "
        "88.1 ± 1.0 % against 95.8 ± 0.6 %."
    )
    assert lines[1] == (
        "Trained without the teacher, the same student reaches a pass@1 of 24.3 ± 1.4 %, "
        "63.8 ± 1.7 points less; before training its pass@1 was 0.0 %."
    )
    assert "is 0.120 nats/token, against 0.951 for the baseline and 6.170 before training" in lines[2]
    assert lines[3].startswith("student-4bit takes 0.24 MiB (33 % of the student) and scores 86.0 ± 1.1 %")


def test_the_verdict_does_not_hide_a_failure():
    def student(score: float) -> list[str]:
        return verdict({**MODELS, "student": {**MODELS["student"], "pass@1": score}})

    assert "the teacher did not help" in student(0.15)[1]
    assert "within two standard errors" in student(0.25)[1]
    assert "did not help" not in student(0.25)[1]
    assert student(0.9575)[0].startswith("The student keeps 99.9 %")
    assert student(0.97)[0].startswith("The student reaches 101 %")


def test_the_verdict_needs_neither_teacher_nor_baseline():
    assert verdict({"student": {"pass@1": 0.5}}) == ["The student's pass@1 is 50.0 %."]
    assert verdict({"student": {"nll": 1.25}, "student_before": {"nll": 4.0}}) == [
        "The student's nll is 1.250 nats/token, against 4.000 before training."
    ]
    assert verdict({"teacher": {"pass@1": 0.9}})[0].startswith("No student was evaluated")


def test_without_a_baseline_the_verdict_says_what_is_not_shown():
    without = {name: metrics for name, metrics in MODELS.items() if name != "baseline"}
    assert any("No baseline was trained" in line for line in verdict(without))
    assert not any("No baseline" in line for line in verdict(MODELS))


def test_across_tokenizers_the_verdict_compares_bytes_not_tokens():
    why = {"kl": None, "kl_why": "the teacher's tokens are others"}
    models = {
        "teacher": {"nll": 1.6, "bits_per_byte": 0.8},
        "baseline": {"nll": 3.0, "bits_per_byte": 1.2, **why},
        "student": {"nll": 2.8, "bits_per_byte": 1.1, **why},
    }
    assert verdict(models) == [
        "The student's nll in bits per byte of text is 1.100, against 0.800 for the teacher and 1.200 for "
        "the baseline."
    ]


def test_of_a_pruned_student_the_verdict_says_what_healing_did():
    lines = verdict(PRUNED)
    assert lines[1] == (
        "Pruned alike and trained on labels alone, it reaches a pass@1 of 24.3 ± 1.4 %, 63.8 ± 1.7 points "
        "less; before healing its pass@1 was 3.1 %."
    )
    assert lines[2].startswith(
        "The student's KL to the teacher is 0.120 nats/token, against 0.951 for the baseline;"
    )
    assert lines[3] == (
        "Cut to 50 % of the weights, its KL to the teacher was 2.500 before healing and is 0.120 nats/token "
        "after."
    )
    assert not any("before training" in line for line in lines)


def test_of_a_sparse_student_it_says_how_many_weights_are_zero():
    before = {**PRUNED["student_before"], "weights_before_pruning": 196608, "sparsity": 0.48}
    line = verdict({**PRUNED, "student_before": before})[3]
    assert line.startswith("With 48 % of its weights at zero, its KL to the teacher was 2.500 before healing")
    both = verdict({**PRUNED, "student_before": {**before, "weights_before_pruning": 393216}})[3]
    assert both.startswith("Cut to 50 % of the weights, with 48 % of its weights at zero, its KL")
    assert not any("healing" in line for line in verdict(MODELS)), "of another student nothing is said"


def test_many_quantized_models_are_one_line_of_the_verdict():
    lines = [line for line in verdict({**MODELS, **SMALLER}) if "student-" in line]
    assert lines == [
        "Smaller models of it: student-8bit 0.40 MiB, 87.9 ± 1.1 % pass@1; student-4bit 0.24 MiB, 86.0 ± 1.1 "
        "% pass@1; student-mxfp4 0.22 MiB, 84.0 ± 1.1 % pass@1; student-3bit 0.19 MiB, 61.0 ± 1.1 % pass@1."
    ]


def test_without_a_score_a_quantized_model_is_told_by_its_kl():
    scoreless = {
        name: {key: value for key, value in metrics.items() if not key.startswith("pass@1")}
        for name, metrics in MODELS.items()
    }
    assert verdict(scoreless)[1] == (
        "student-4bit takes 0.24 MiB (33 % of the student) and has a KL to the teacher of 0.144 nats/token, "
        "0.024 more."
    )


# --- models that were compared problem by problem ---


def told(
    metric: str,
    model: str,
    other: str,
    difference: float,
    low: float | None,
    high: float | None,
    **given: Any,
) -> dict[str, Any]:
    """A line of `comparisons`, with the verdict that its interval allows."""
    side = 0 if low is None or high is None else (low > 0) - (high < 0)
    side *= 1 if METRICS[metric].better == "higher" else -1
    said = ("no difference seen", "better", "worse")[side]
    line = {"metric": metric, "model": model, "other": other, "problems": 300, "difference": difference}
    return line | {"low": low, "high": high, "level": 0.95, "verdict": said} | given


TOLD = [
    told("pass@1", "student", "teacher", -0.077, -0.102, -0.053),
    told("pass@1", "student", "baseline", 0.638, 0.609, 0.666),
    told("pass@1", "student", "student_before", 0.881, 0.858, 0.899),
    told("pass@1", "student-4bit", "student", -0.021, -0.045, 0.003),
    told("pass@1", "teacher", "student_before", 0.958, 0.94, 0.97),
    told("kl", "student", "baseline", -0.8307, -0.9, -0.76),
    told("kl", "student", "student_before", -6.0501, -6.3, -5.8),
]


def instead(*lines: dict[str, Any]) -> list[dict[str, Any]]:
    """TOLD with other lines on the same models."""
    kept = {(line["metric"], line["model"], line["other"]): line for line in [*TOLD, *lines]}
    return list(kept.values())


def test_every_difference_has_its_interval():
    assert verdict(MODELS, TOLD) == [
        "The student keeps 92 % of the teacher's pass@1 at 19 % of its parameters: 88.1 ± 1.0 % against "
        "95.8 ± 0.6 % (7.7 points less, 95 % interval 5.3 to 10.2, on 300 problems).",
        "Against the same student trained without the teacher, it is better in pass@1 (24.3 ± 1.4 %; 63.8 "
        "points more, 95 % interval 60.9 to 66.6); against itself before training, it is better in pass@1 "
        "(0.0 %; 88.1 points more, 95 % interval 85.8 to 89.9).",
        "The student's KL to the teacher is 0.120 nats/token, better than 0.951 for the baseline (0.831 "
        "nats/token less, 95 % interval 0.760 to 0.900, on 300 rows) and better than 6.170 before training "
        "(6.050 nats/token less, 95 % interval 5.800 to 6.300); 96.3 % of its first choices are the "
        "teacher's.",
        "student-4bit takes 0.24 MiB (33 % of the student) and shows no difference in pass@1 (86.0 ± 1.1 %; "
        "2.1 points less, 95 % interval 4.5 less to 0.3 more).",
    ]


@pytest.mark.parametrize("models", [MODELS, PRUNED, {**MODELS, **SMALLER}])
def test_no_word_of_a_difference_stands_without_its_interval(models: dict[str, Any]):
    for line in verdict(models, TOLD):
        words = line.count(" better ") + line.count(" worse ") + line.count("no difference")
        assert line.count("95 % interval") >= words, line


def test_what_is_not_told_apart_is_not_called_better():
    found = instead(
        told("pass@1", "student", "teacher", 0.01, -0.02, 0.04),
        told("pass@1", "student", "baseline", 0.006, -0.012, 0.02),
        told("kl", "student", "baseline", -0.0204, -0.05, 0.0),
    )
    lines = verdict(MODELS, found)
    assert "(no difference seen: 1.0 points more, 95 % interval 2.0 less to 4.0 more" in lines[0]
    assert (
        "it shows no difference in pass@1 (24.3 ± 1.4 %; 0.6 points more, 95 % interval 1.2 less to 2.0 more"
        in lines[1]
    )
    assert "so nothing here shows that the teacher helped" in lines[1]
    assert (
        "not seen to differ from 0.951 for the baseline (0.020 nats/token less, 95 % interval 0.050 less "
        "to 0, on 300 rows)" in lines[2]
    )


def test_a_baseline_that_is_better_is_said_to_be():
    line = verdict(MODELS, instead(told("pass@1", "student", "baseline", -0.05, -0.08, -0.02)))[1]
    assert "it is worse in pass@1 (24.3 ± 1.4 %; 5.0 points less, 95 % interval 2.0 to 8.0)" in line
    assert "so here the teacher did not help" in line
    assert "did not help" not in " ".join(verdict(MODELS, TOLD))


def test_a_teacher_that_is_no_better_has_nothing_to_teach():
    same = told("pass@1", "teacher", "student_before", 0.004, -0.02, 0.03)
    line = verdict(MODELS, instead(same))[1]
    assert line == (
        "Perhaps nothing to distil: the teacher shows no difference from the student before training in "
        "pass@1 (95.8 ± 0.6 % against 0.0 %; 0.4 points more, 95 % interval 2.0 less to 3.0 more, on 300 "
        "problems)."
    )
    worse = told("pass@1", "teacher", "student_before", -0.04, -0.06, -0.02)
    assert verdict(MODELS, instead(worse))[1].startswith("Nothing to distil: the teacher is worse than")
    few = told("pass@1", "teacher", "student_before", 0.0, None, None, problems=4)
    assert "distil" not in " ".join([*verdict(MODELS, TOLD), *verdict(MODELS, instead(few))])


def test_without_a_score_the_labels_show_whether_there_was_something_to_teach():
    models = {
        "teacher": {"nll": 1.2},
        "student_before": {"nll": 1.1, "kl": 0.3},
        "student": {"nll": 1.1, "kl": 0.1},
    }
    line = verdict(models, [told("nll", "teacher", "student_before", 0.1, 0.05, 0.15)])[1]
    assert line.startswith(
        "Nothing to distil: the teacher is worse than the student before training in nll (1.200"
    )
    assert "on 300 rows" in line


def test_a_student_that_is_its_own_teacher_is_no_reason_to_warn():
    own = {**MODELS["student_before"], "pass@1": 0.5, "kl": 2e-7}
    models = {"teacher": {**own, "kl": None}, "student_before": own, "student": {**own, "pass@1": 0.6}}
    assert is_its_own_teacher(models) and not is_its_own_teacher(MODELS)
    found = [
        told("pass@1", "teacher", "student_before", 0.0, -0.01, 0.01),
        told("pass@1", "student", "teacher", 0.1, 0.05, 0.15),
        told("pass@1", "student", "student_before", 0.1, 0.05, 0.15),
    ]
    lines = verdict(models, found)
    assert lines[0] == (
        "The student reaches 120 % of its own pass@1 before training, when it was its own teacher: 60.0 % "
        "against 50.0 % (10.0 points more, 95 % interval 5.0 to 15.0, on 300 problems)."
    )
    assert "distil" not in " ".join(lines) and "itself before training" not in " ".join(lines)
    unlike = {**models, "teacher": {**own, "parameters": 10**6}, "student_before": {**own, "kl": 0.2}}
    assert "distil" in " ".join(verdict(unlike, found))
    for model in models.values():
        del model["kl"]
    assert is_its_own_teacher(models), "the numbers that both have are the same"


def test_of_few_problems_it_says_so():
    few = [
        {**line, "low": None, "high": None, "verdict": "no difference seen", "problems": 3} for line in TOLD
    ]
    lines = verdict(MODELS, few)
    assert lines[0].endswith("88.1 ± 1.0 % against 95.8 ± 0.6 % (3 problems are too few to tell).")
    assert "it cannot be told apart in pass@1 (24.3 ± 1.4 %; 3 problems are too few to tell);" in lines[1]
    assert "against 0.951 for the baseline (3 rows are too few to tell) and 6.170 before" in lines[2]
    one = [{**line, "problems": 1} for line in few]
    assert "(1 problem is too few to tell)" in verdict(MODELS, one)[0]
    assert not {"better", "worse"} & set(" ".join([*lines, *verdict(MODELS, one)]).split())


def test_several_tasks_share_their_sentences():
    models = {name: {**found, "exact_match": found["pass@1"] / 2} for name, found in MODELS.items()}
    found = [
        *TOLD,
        told("exact_match", "student", "teacher", -0.038, -0.06, -0.02, problems=1200),
        told("exact_match", "student", "baseline", 0.0, -0.02, 0.02, problems=1200),
        told("exact_match", "student", "student_before", -0.1, -0.15, -0.05, problems=1200),
        told("exact_match", "student-4bit", "student", -0.1, -0.15, -0.05, problems=1200),
    ]
    lines = verdict(models, found)
    assert len(lines) == len(verdict(MODELS, TOLD))
    assert lines[0] == (
        "At 19 % of the parameters, the student keeps 92 % of the teacher's pass@1 (88.1 ± 1.0 % against "
        "95.8 ± 0.6 %; 7.7 points less, 95 % interval 5.3 to 10.2, on 300 problems) and 92 % of its "
        "exact_match (44.0 % against 47.9 %; 3.8 points less, 95 % interval 2.0 to 6.0, on 1,200 problems)."
    )
    assert "; the same, 95 % interval 2.0 less to 2.0 more), so in exact_match nothing shows" in lines[1]
    assert (
        "is better in pass@1 (0.0 %; 88.1 points more, 95 % interval 85.8 to 89.9) and is worse in exact"
        in lines[1]
    )
    assert lines[3].startswith(
        "student-4bit takes 0.24 MiB (33 % of the student), is worse in exact_match (43.0 %;"
    )
    worse = instead(told("pass@1", "student", "baseline", -0.1, -0.2, -0.05), *found[-4:])
    assert (
        ", so in pass@1 the teacher did not help, and in exact_match nothing shows"
        in verdict(models, worse)[1]
    )


def test_every_score_of_a_task_is_known():
    for names in [names for task, names in SCORES.items() if task != "fidelity"]:
        models = {"student": {names[0]: 0.5}, "teacher": {names[0]: 0.75}}
        (first, _) = verdict(models, [told(names[0], "student", "teacher", -0.25, -0.3, -0.2)])
        assert first.startswith(f"The student keeps 67 % of the teacher's {names[0]}: 50.0 %") == (
            METRICS[names[0]].unit == "%"
        )
        assert names[0] in first and "95 % interval" in first


def test_a_teacher_that_scores_nothing_is_no_divisor():
    models = {"student": {"pass@1": 0.5}, "teacher": {"pass@1": 0.0}}
    line = verdict(models, [told("pass@1", "student", "teacher", 0.5, 0.4, 0.6)])[0]
    assert line == (
        "The student's pass@1 is 50.0 % against the teacher's 0.0 % (50.0 points more, 95 % interval 40.0 to "
        "60.0, on 300 problems)."
    )


def test_many_smaller_models_are_one_line_with_their_intervals():
    found = [
        told("pass@1", f"student-{name}", "student", -0.2, -0.3, -0.1) for name in ("8bit", "4bit", "3bit")
    ]
    (line,) = [line for line in verdict({**MODELS, **SMALLER}, [*found, *TOLD[:3]]) if "student-" in line]
    assert (
        "student-3bit 0.19 MiB, 61.0 ± 1.1 % pass@1 (worse: 20.0 points less, 95 % interval 10.0 to 30.0)"
        in line
    )
    assert "student-mxfp4 0.22 MiB, 84.0 ± 1.1 % pass@1; " in line, "which was not compared"


def test_numbers_that_rounding_would_hide_are_shown():
    passed, loss = METRICS["pass@1"], METRICS["kl"]
    assert [fine(passed, value) for value in (0.0, 0.0004, 0.0006, 0.12)] == ["0", "0.04", "0.1", "12.0"]
    assert [fine(loss, value) for value in (0.00003, 0.4, 1e-12)] == ["0.00003", "0.400", "0"]
    line = verdict(MODELS, instead(told("pass@1", "student", "baseline", 0.01, 0.0003, 0.02)))[1]
    assert "is better in pass@1 (24.3 ± 1.4 %; 1.0 points more, 95 % interval 0.03 to 2.0)" in line


@pytest.mark.parametrize(
    "spoilt",
    [
        {"metric": "no such"},
        {"metric": None},
        {"model": "student-9bit"},
        {"difference": None},
        {"difference": "a lot"},
        {"verdict": "great"},
        {"problems": 0},
    ],
)
def test_a_comparison_that_cannot_be_read_is_left_out(spoilt: dict[str, Any]):
    assert verdict(MODELS, [{**TOLD[0], **spoilt}]) == verdict(MODELS)


def test_a_comparison_of_what_was_not_measured_is_left_out():
    models = {**MODELS, "baseline": {"pass@1": None, "pass@1_why": "no answers"}}
    without = {**models, "baseline": {}}
    del models["student_before"], without["student_before"]
    assert verdict(models, TOLD) == verdict(without, TOLD)


def test_a_run_without_comparisons_claims_nothing():
    assert verdict(MODELS, []) == verdict(MODELS)
    assert not {"better", "worse"} & set(" ".join(verdict(MODELS)).split())


@pytest.mark.parametrize("given", [None, "none", [1, None, {}]])
def test_a_run_is_opened_with_what_it_compared_and_without(tmp_path: Path, given: Any):
    tree: dict[str, Any] = {"schema": 1, "recipe": "r", "models": MODELS, "comparisons": TOLD}
    (tmp_path / "evaluation.json").write_text(json.dumps(tree), encoding="utf-8")
    run = read_run(tmp_path)
    assert verdict(run.models, run.comparisons) == verdict(MODELS, TOLD)
    tree["comparisons"] = given
    if given is None:
        del tree["comparisons"]  # as older versions wrote it
    (tmp_path / "evaluation.json").write_text(json.dumps(tree), encoding="utf-8")
    run = read_run(tmp_path)
    assert verdict(run.models, run.comparisons) == verdict(MODELS)


# --- what it costs ---


def costs(speed: float, spread: float | None, energy: float | None = None) -> list[str]:
    spreads = {} if spread is None else {"decode_tokens_per_second_spread": spread}
    student = {"decode_tokens_per_second": speed, "size_mib": 19.0, **spreads}
    teacher = {"decode_tokens_per_second": 100.0, "size_mib": 100.0, **spreads}
    if energy is not None:
        student |= {"joules_per_token": energy, "joules_per_token_spread": 0.01}
        teacher |= {"joules_per_token": 1.0, "joules_per_token_spread": 0.01}
    return [line for line in verdict({"student": student, "teacher": teacher}) if "Beside" in line]


def test_speed_stands_beside_the_bytes_where_it_has_a_spread():
    assert costs(310.0, 5.0) == [
        "Beside the teacher, the student decodes 3.1 times as many tokens a second and takes 19 % of the "
        "bytes on disk."
    ]
    assert costs(310.0, None) == []
    assert "decodes 12 % more tokens a second" in costs(112.0, 5.0)[0]
    assert "decodes 20 % fewer tokens a second" in costs(80.0, 5.0)[0]
    assert "decodes 14 times as many" in costs(1400.0, 5.0)[0]
    assert costs(1400.0, 5.0, 0.31)[0].endswith(
        "tokens a second, takes 31 % of the energy a token and takes 19 % of the bytes on disk."
    )


def test_within_the_spread_nothing_is_faster():
    (line,) = costs(109.0, 5.0, 1.015)
    assert line == (
        "Beside the teacher, the student decodes as many tokens a second (within their spread), "
        "takes as much energy a token and takes 19 % of the bytes on disk."
    )


# --- from the answers to the sentences ---


def test_what_an_evaluation_compares_the_verdict_says():
    """The same numbers in both: of models of which nine tenths of the problems are alike."""
    random = generator(0, "answers")
    hard, lucky = random.random((2, 300))

    def passed(rate: float) -> np.ndarray:
        passes = np.where(lucky < 0.1, random.random(300), hard) < rate
        return np.stack([passes, np.ones(300)], -1).astype(float)

    rates = {"teacher": 0.9, "student_before": 0.1, "baseline": 0.5, "student": 0.8, "student-4bit": 0.8}
    sums = {model: {"pass@1": passed(rate)} for model, rate in rates.items()}
    models = {model: {"pass@1": found["pass@1"][:, 0].mean()} for model, found in sums.items()}
    found = comparisons(sums, seed=0)
    assert len(read(found, models)) == len(found) == 5
    said = " ".join(verdict(models, found))
    for one in found:
        if (one["model"], one["other"]) != ("teacher", "student_before"):
            assert f"{100 * abs(one['difference']):.1f} points" in said
            assert f"{100 * abs(one['low']):.1f}" in said and f"{100 * abs(one['high']):.1f}" in said
    assert "it is better in pass@1" in said
    assert "student-4bit shows no difference in pass@1" in said
