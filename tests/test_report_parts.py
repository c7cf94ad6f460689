"""Each part of a report by itself: what it says is what the run folder holds, whatever that is."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import COMPARISONS, DISAGREEMENTS, MODELS, TASKS, Page, make_run

from mlx_distill.report import write_comparison, write_report
from mlx_distill.report_compared import between_runs, comparisons, facts
from mlx_distill.report_disagreement import LEVELS, disagreements, visible
from mlx_distill.report_figures import costs, short_names
from mlx_distill.report_lineage import memory
from mlx_distill.report_page import sandbox_of, speed_table
from mlx_distill.report_samples import folded, samples, shown
from mlx_distill.report_tasks import unlike
from mlx_distill.run_record import RunRecord, read_run

STYLE = (Path(__file__).parent.parent / "mlx_distill" / "pages" / "style.css").read_text(encoding="utf-8")


def read(folder: Path, **files: Any) -> RunRecord:
    """A finished run with other files: by name with `_` for the dot, JSON or one object a line."""
    run = make_run(folder, name=folder.name)
    for name, value in files.items():
        stem, _, kind = name.rpartition("_")
        path = run / f"{stem}.json" if kind == "json" else run / "samples" / f"{stem}.jsonl"
        lines = [json.dumps(one) for one in value] if kind == "jsonl" else [json.dumps(value)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_run(run)


# --- differences ---------------------------------------------------------------------------------


def row_of(metric: str, low: float | None, difference: float, high: float | None) -> dict[str, Any]:
    found = comparisons(
        [{"metric": metric, "model": "a", "other": "b", "difference": difference, "low": low, "high": high}],
        {},
    )
    assert found is not None
    return found["groups"][0]["rows"][0]


def test_a_bar_crosses_zero_where_the_interval_does_and_better_is_right() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        low, difference, high = (float(x) for x in np.sort(random.normal(size=3)))
        for metric, sign in (("pass@1", 1), ("kl", -1)):
            row = row_of(metric, low, difference, high)
            left, right, at = float(row["left"]), float(row["left"]) + float(row["width"]), float(row["at"])
            assert -0.011 <= left <= at + 0.011 and at <= right + 0.011 <= 100.03
            assert (left < 49.99 and right > 50.01) == (low < 0 < high)
            assert (at > 50) == (sign * difference > 0), "the usual mistake: a lower KL drawn as worse"


def test_the_bars_of_one_metric_share_a_scale() -> None:
    found = comparisons(COMPARISONS, {"student": "student", "baseline": "baseline, no teacher"})
    assert found is not None
    first, second = found["groups"]
    assert [group["name"] for group in found["groups"]] == ["pass@1", "kl"]
    at = [float(row["at"]) - 50 for row in first["rows"]]
    assert at[1] / at[0] == pytest.approx(-math.sqrt(0.638 / 0.077), rel=1e-3)
    assert first["rows"][1]["other"] == "baseline, no teacher"
    assert [row["verdict"] for row in first["rows"]] == ["worse", "better", "no difference seen"]
    assert len({row["sign"] for row in first["rows"]}) == 3, "told apart without colour"
    assert first["rows"][0]["difference"] == "−7.7 points"
    assert second["rows"][0]["interval"] == "−0.860 to −0.800"


def test_too_few_rows_have_no_bar() -> None:
    assert row_of("pass@1", None, 0.5, None)["interval"] == "too few rows for an interval"
    assert row_of("pass@1", 0.0, 0.0, 0.0)["difference"] == "0.0 points"


def test_what_is_saved_is_the_ratio_to_the_teacher() -> None:
    found = {fact["name"]: fact for fact in facts(MODELS)}
    assert found["size on disk"]["big"] == f"{3.927 / 0.751:.1f} × smaller"
    assert found["size on disk"]["others"] == [f"student-4bit: {3.927 / 0.2442:,.0f} × smaller"]
    assert found["writing"]["big"] == f"{3290 / 1210.3:.1f} × faster"
    assert found["memory"]["detail"] == "0.22 against 0.41 GiB"
    assert "energy" not in found, "it was not measured"
    slower = {**MODELS, "student": {**MODELS["student"], "decode_tokens_per_second": 605.15}}
    assert next(f for f in facts(slower) if f["name"] == "writing")["big"] == "2.0 × slower"
    assert facts({"student": MODELS["student"]}) == []


# --- several runs --------------------------------------------------------------------------------


def answers(scores: list[float], model: str = "student", first: int = 0) -> list[dict[str, Any]]:
    return [
        {"task": "code", "set": None, "prompt": f"p{first + i}", "reference": "r",
         "answers": {model: {"text": f"{x}", "score": x, "why": None, "scores": [x]}}}
        for i, x in enumerate(scores)
    ]  # fmt: skip


def test_students_of_two_runs_are_compared_on_the_rows_that_both_answered(tmp_path: Path) -> None:
    ours, theirs = [1.0] * 60 + [0.0] * 20, [0.0] * 50 + [1.0] * 30
    one = read(tmp_path / "a", evaluation_jsonl=answers(ours))
    two = read(tmp_path / "b", evaluation_jsonl=answers(theirs[10:], first=10)[::-1])  # in another order
    found, notes = between_runs([one, two])
    assert [(row["model"], row["other"], row["metric"]) for row in found] == [("b", "a", "pass@1")]
    assert found[0]["problems"] == 70
    assert found[0]["difference"] == pytest.approx(np.mean(theirs[10:]) - np.mean(ours[10:]))
    assert found[0]["verdict"] == "worse"
    assert notes == ["b and a share 70 of 80 rows scored by pass@1; only those are compared."]
    alone = read(tmp_path / "c", evaluation_jsonl=answers(ours, first=500))
    assert between_runs([one, alone]) == (
        [],
        ["c and a share no row scored by pass@1; only those are compared."],
    )


def test_rows_of_one_text_stay_rows_of_their_own(tmp_path: Path) -> None:
    twice = [{**row, "prompt": "same"} for row in answers([1.0, 0.0] * 4)]
    runs = [read(tmp_path / name, evaluation_jsonl=twice) for name in "ab"]
    found, _ = between_runs(runs)
    assert found[0]["problems"] == 8 and found[0]["difference"] == 0


def test_a_comparison_shows_verdicts_samples_and_what_was_asked_otherwise(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, name=name)
    tree = json.loads((tmp_path / "b" / "evaluation.json").read_text(encoding="utf-8"))
    tree["tasks"]["code"]["temperature"] = 0.8
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(tree), encoding="utf-8")
    html = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text(
        encoding="utf-8"
    )
    text = " ".join(Page(html).text.split())
    for name in ("a", "b"):
        assert f"{name}: The student" in text
    assert "code was not the same test for all runs (temperature differs: a 0.0, b 0.8)" in text
    assert "9 of 20 rows had this outcome" not in text and "18 of 20 rows had this outcome" in text
    assert text.count("GiB of memory") == 2
    assert unlike([read_run(tmp_path / "a")] * 2) == []


# --- tokens --------------------------------------------------------------------------------------


def marked(html: str) -> list[str]:
    """The tokens' blocks, as text without our own signs."""
    blocks = re.findall(r'<div class="tokens">.*?<pre>(.*?)</pre>', html, re.DOTALL)
    return [Page(re.sub(r"<i aria-hidden.*?</i>", "", block)).text for block in blocks]


def test_the_tokens_of_an_answer_join_to_it_and_the_worst_comes_first(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    wanted = ["".join(token[0] for token in row["tokens"]) for row in (DISAGREEMENTS[1], DISAGREEMENTS[0])]
    assert marked(html) == wanted
    assert "teacher ␣x↵ · the student ␣y↵ · right ␣x↵" in html
    assert html.index("KL 0.900 nats/token") < html.index("KL 0.400 nats/token")


def test_a_token_is_tinted_by_its_kl_and_underlined_where_the_choices_differ() -> None:
    kls = [0.0, 0.049, 0.05, 0.19, 0.2, 0.5, 1.0, 2.0, 9.0]
    row = {"model": "student", "prompt": "p", "kl": 1.0, "tokens": [["t", kl, "a", "b"] for kl in kls]}
    found = disagreements([row], MODELS)
    assert found is not None
    runs = found["groups"][0]["rows"][0]["runs"]
    assert [run["level"] for run in runs] == [sum(kl >= level for level in LEVELS) for kl in kls]
    assert all(run["other"] for run in runs)
    assert len(found["legend"]) == len(LEVELS) + 1
    same = {**row, "tokens": [["t", kl, "a", "a"] for kl in kls]}
    (group,) = disagreements([same], MODELS)["groups"]  # pyright: ignore[reportOptionalSubscript]
    assert [run["level"] for run in group["rows"][0]["runs"]] == [None, 1, 1, 2, 3, 4, 5, 5]
    assert group["rows"][0]["runs"][0]["text"] == "tt", "what agrees is plain text"


def test_rows_that_are_no_disagreements_are_left_out() -> None:
    odd: list[dict[str, Any]] = [
        {},
        {"kl": 1.0},
        {"kl": float("nan"), "tokens": []},
        {"kl": 1.0, "tokens": [["a", 1.0, "b"]]},
        {"kl": 1.0, "tokens": [[1, 1.0, "b", "c"]]},
        {"kl": 1.0, "tokens": ["abcd"]},
    ]
    assert disagreements(odd, MODELS) is None
    assert disagreements([{"kl": 1.0, "tokens": [["a", None, 3, None]]}], MODELS) is not None


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "(the end)"), ("  ", "␣␣"), (" x\n", "␣x↵"), ("\t", "⇥"), ("a b", "a b"), ("\n ", "↵␣")],
)
def test_white_space_of_a_token_can_be_seen(text: str, shown: str) -> None:
    assert visible(text) == shown


# --- colours -------------------------------------------------------------------------------------


def palettes() -> dict[str, dict[str, str]]:
    light, dark = (
        dict(re.findall(r"--(\w+): ([^;]+);", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    )
    return {"light": light, "dark": light | dark}


def rgb(color: str) -> np.ndarray:
    if color.startswith("#"):
        return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)
    return np.array([int(part) for part in color.split()], float)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2.2: relative luminance, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(color: np.ndarray) -> float:
        part = color / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(theme: str) -> None:
    """AA: 4.5 for text, 3 for what is drawn."""
    colors = {name: rgb(value) for name, value in palettes()[theme].items()}
    for ground in ("paper", "card", "tint"):
        for text in ("ink", "faint", "right", "wrong"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for index in range(8):
            assert contrast(colors[f"c{index}"], colors[ground]) >= 3, (index, ground)
    assert contrast(colors["ink"], colors["warn"]) >= 4.5
    assert contrast(colors["paper"], colors["ink"]) >= 4.5  # what a token says when pointed at
    shares = [
        float(share) for share in re.findall(r"\.k\d \{ background: rgb\(var\(--heat\) / ([\d.]+)\)", STYLE)
    ]
    assert len(shares) == len(LEVELS) and shares == sorted(shares)
    for share in shares:
        assert contrast(colors["ink"], share * colors["heat"] + (1 - share) * colors["card"]) >= 4.5, share


def test_a_pale_text_would_be_seen() -> None:
    assert contrast(rgb("#000000"), rgb("#ffffff")) == pytest.approx(21)
    assert contrast(rgb("#9a9da4"), rgb("#fcfcfa")) < 3  # what a colour of the figures once was


# --- costs ---------------------------------------------------------------------------------------


def test_quality_by_cost_is_one_divided_by_the_other() -> None:
    pytest.importorskip("matplotlib")
    colors = dict.fromkeys(MODELS, 0)
    size, latency, energy = costs(MODELS, colors, short_names(MODELS))
    assert size["title"] == "pass@1 against size"
    assert {bar["label"]: bar["text"] for bar in size["bars"]}["student"] == f"{88.1 / 0.751:.0f}"
    ranked = [
        100 * MODELS[n]["pass@1"] / MODELS[n]["size_mib"] for n in ("student-4bit", "student", "baseline")
    ]
    assert [bar["label"] for bar in size["bars"]][:3] == ["student-4bit", "student", "baseline"]
    assert [float(bar["width"]) for bar in size["bars"]][:3] == pytest.approx(
        [100 * one / ranked[0] for one in ranked], abs=0.06
    )
    assert {bar["label"]: bar["text"] for bar in latency["bars"]}["student"] == f"{88.1 * 3.29:.0f}"
    assert energy["svg"] == "" and energy["note"] == "Not drawn: energy is measured on macOS only."


def test_the_figures_of_quality_share_their_upright_axis() -> None:
    pytest.importorskip("matplotlib")
    before = {**MODELS["student_before"], "decode_tokens_per_second": None}  # the lowest of all
    models = {**MODELS, "student_before": before}
    ticks = []
    for figure in costs(models, dict.fromkeys(models, 0), {})[:2]:
        axis = figure["svg"][figure["svg"].index("matplotlib.axis_2") :]
        ticks.append(re.findall(r'<use [^>]*y="([\d.]+)".*?<text [^>]*>([\d.]+)</text>', axis, re.DOTALL))
    assert ticks[0] == ticks[1] and len(ticks[0]) > 3, "the same numbers at the same heights"


def test_without_speed_the_time_to_the_first_token_is_the_latency() -> None:
    pytest.importorskip("matplotlib")
    models = {
        name: {"pass@1": 0.5, "size_mib": i + 1.0, "time_to_first_token_ms": 3.0 + i}
        for i, name in enumerate(("teacher", "student"))
    }
    _, latency, energy = costs(models, {}, {})
    assert "milliseconds to the first token" in latency["svg"]
    assert energy["note"] == "Not drawn: nobody measured it."
    assert costs({"student": models["student"]}, {}, {}) == []


def test_of_a_kl_there_is_no_quality_by_cost() -> None:
    pytest.importorskip("matplotlib")
    models = {name: {"kl": 0.5, "size_mib": 2.0 + i} for i, name in enumerate(("student", "student-4bit"))}
    assert [figure["bars"] for figure in costs(models, {}, {})] == [[], [], []]


def test_speed_has_a_line_a_length_and_a_model() -> None:
    def at(length: int, speed: float) -> dict[str, Any]:
        return {
            "prompt_tokens": length,
            "decode_tokens_per_second": speed,
            "decode_tokens_per_second_spread": 2.0,
            "joules_per_token": None,
            "joules_per_token_why": "no counter",
        }

    lines = [(name, 0, {"speed": [at(512, 50.0), at(128, 60.0)]}) for name in ("teacher", "student")]
    (table,) = speed_table(lines)
    assert [heading for heading, _ in table["groups"]] == ["a prompt of 128 tokens", "a prompt of 512 tokens"]
    assert [[row[0] for row in rows] for _, rows in table["groups"]] == [["teacher", "student"]] * 2
    cells = table["groups"][1][1][0][2]
    assert [(cell["text"], cell["spread"]) for cell in cells] == [("50.0", "2.00"), (None, None)]
    assert table["reasons"] == ["no counter"] and "quartiles" in table["note"]
    assert speed_table([("student", 0, {"speed": [at(128, 60.0)]})]) == []
    assert speed_table([("student", 0, {"speed": "fast"}), ("b", 0, {"speed": [1, {}]})]) == []


# --- the rest ------------------------------------------------------------------------------------


def test_a_folded_text_loses_nothing() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        words = [
            "".join(random.choice(list("ab c"), random.integers(0, 150)))
            for _ in range(random.integers(1, 40))
        ]
        text = "\n".join(words)[:3900]
        found = folded(text)
        assert re.sub(r"\s", "", found["head"] + found["rest"]) == re.sub(r"\s", "", text)
        assert bool(found["rest"]) == bool(found["more"])
        assert len(found["head"]) <= 12 * 65 + 3 * 64 + 2 * 150
    assert folded(None) == {"head": "", "rest": "", "more": ""}
    assert folded("x" * 5000)["rest"].endswith("[1,000 more characters]")


def test_published_sets_are_groups_of_their_own_behind_the_users_rows() -> None:
    rows = [{**row, "set": name} for name in ("humaneval", None, "mbpp") for row in answers([1.0, 0.0])]
    rows.append({"task": ["odd"], "prompt": 1, "answers": {"student": {}}})
    found = samples(rows, shown({"student": {}}))
    assert [group["title"] for group in found] == ["Programs", "['odd']", "HumanEval", "MBPP"]
    assert [outcome["rows"] for outcome in found[0]["outcomes"]] == [1, 1]


def test_what_failed_stands_before_the_answer(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    at = html.index('<div class="why">f([1, 2]) gave 7, not 12</div>')
    assert html.index("values = [x + 2 for x in values]") > at


def test_memory_is_drawn_on_one_scale(tmp_path: Path) -> None:
    run = read(tmp_path / "run")
    found = memory([run])
    assert found is not None
    (group,) = found["groups"]
    predicted, generate, train = group["rows"]
    assert [row["text"] for row in group["rows"]] == ["0.0640", "0.31", "0.0800"]
    assert sum(float(part["width"]) for part in predicted["parts"]) == pytest.approx(
        100 * 0.064 / 0.31, abs=0.02
    )
    assert generate["parts"][0]["width"] == "100.00"
    assert float(train["parts"][0]["width"]) == pytest.approx(100 * 0.08 / 0.31, abs=0.01)
    assert "Predicted is 0.8 times what training took." in found["notes"]
    assert [row["label"] for row in group["rows"]][1:] == ["measured: generate", "measured: train"]
    unmeasured = {"predicted_gib": {"together": 1.0}, "measured_gib": {}, "why": "no counter here"}
    other = memory([read(tmp_path / "b", memory_json=unmeasured)])
    assert other is not None and other["notes"] == ["Not measured: no counter here."]
    assert memory([read(tmp_path / "c", memory_json={})]) is None


def test_where_nothing_held_the_programs_the_report_warns(tmp_path: Path) -> None:
    for kind, warned in (("unshare", 0), ("bubblewrap", 0), ("seatbelt", 0), ("limits", 1)):
        held, warnings = sandbox_of({"student": {"sandbox": kind}})
        assert (held, len(warnings)) == (kind, warned)
    assert sandbox_of({"student": {"humaneval_sandbox": "limits"}})[1]
    assert sandbox_of({"student": {"pass@1": 0.5}}) == (None, [])
    models = {name: {**found, "sandbox": "limits"} for name, found in MODELS.items()}
    html = write_report(make_run(tmp_path / "run", models=models)).read_text(encoding="utf-8")
    assert "Trust these numbers as far as you trust the models" in html[: html.index("<main>")]


def test_how_a_task_was_asked_stands_at_the_foot(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")).text
    foot = " ".join(text[text.rindex("How it was made") :].split())
    assert "mlx-distill run recipes/quickstart.yaml mlx_distill 0.1.0 · commit 1f3c9ab · MLX 0.32.4" in foot
    for value in ("2", "1000", "0.0", "100", "256", "5.0", "abababababab…"):
        assert value in foot
    assert TASKS["code"]["prompt"] in text


def test_odd_values_in_any_file_cost_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take most of the time
    odd: list[Any] = [
        None,
        3,
        "x",
        [],
        {},
        [None],
        {"a": None},
        {"kl": "b", "tokens": 3, "answers": {"student": 1}},
    ]
    for number, value in enumerate(odd):
        run = make_run(tmp_path / str(number))
        tree = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        tree |= {"comparisons": value, "tasks": {"code": value}}
        (run / "evaluation.json").write_text(json.dumps(tree), encoding="utf-8")
        for name in ("stages", "memory", "environment"):
            (run / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        (run / "stages.json").write_text(
            json.dumps({"train": value, "baseline": {"rows": value}}), encoding="utf-8"
        )
        (run / "memory.json").write_text(
            json.dumps({"predicted_gib": value, "measured_gib": {"train": value}}), encoding="utf-8"
        )
        for name in ("evaluation", "disagreements", "generated"):
            (run / "samples" / f"{name}.jsonl").write_text(json.dumps(value) + "\n", encoding="utf-8")
        assert "88.1" in write_report(run).read_text(encoding="utf-8")
        assert "88.1" in write_comparison([run, run], tmp_path / "both.html").read_text(encoding="utf-8")
