"""Which models are on the front, which one is picked, and what page and console say of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page, make_run

from mlx_distill.frontier import Frontier, Measured, frontier, on_front, sentence
from mlx_distill.report_frontier import as_tree, console_lines, write_frontier
from mlx_distill.run_record import read_run


def found(size: float, score: float | None, speed: float | None = 100.0, **more: Any) -> dict[str, Any]:
    """METRICS of one model."""
    return {"size_mib": size, "pass@1": score, "parameters": 1000, "decode_tokens_per_second": speed, **more}


TEACHER = found(4.0, 1.0, 50.0)
HALF = {
    "teacher": TEACHER,
    "baseline": found(2.0, 0.99),
    "student_before": found(2.0, 0.99),
    "student": found(2.0, 0.95),
    "student-8bit": found(0.5, 0.94),
    "student-4bit": found(0.25, 0.80),
}
THIRD = {
    "teacher": TEACHER,
    "student": found(1.2, 0.92),
    "student-8bit": found(0.3, 0.91),
    "student-4bit": found(0.15, 0.5),
}


def of(*runs: dict[str, Any], share: float = 0.9, score: str = "pass@1") -> Frontier:
    made = [Measured(f"r{i}", models, 0.5 / (i + 1), "embedded") for i, models in enumerate(runs)]
    return frontier(made, score, share)


def by_definition(points: list[tuple[float, float]]) -> list[bool]:
    """Nothing costs no more, is no worse, and is not the same in both."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    return [not any(beats(other, point) for other in points) for point in points]


def test_the_front_is_what_no_other_beats() -> None:
    random = np.random.default_rng(0)
    for number in (1, 2, 5, 12):
        for _ in range(200):  # few values, so that many are equal in one, or in both
            points = [(float(a), float(b)) for a, b in random.integers(0, 6, size=(number, 2))]
            assert on_front(points) == by_definition(points), points


def test_the_usual_mistake_of_a_front_is_seen() -> None:
    """Only strictly better in both: the costlier of two equally good would be on the front."""
    points = [(1.0, 5.0), (2.0, 5.0), (1.0, 4.0)]
    strictly = [not any(o[0] < p[0] and o[1] > p[1] for o in points) for p in points]
    assert strictly == [True, True, True]
    assert on_front(points) == [True, False, False]
    assert on_front([(1.0, 5.0), (1.0, 5.0)]) == [True, True]


def test_what_was_not_measured_is_neither_on_the_front_nor_off_it() -> None:
    assert on_front([(1.0, 1.0), (None, 9.0), (0.5, None), (2.0, 0.5)]) == [True, None, None, False]
    assert on_front([]) == []


def test_the_smallest_above_the_line_is_picked() -> None:
    made = of(HALF, THIRD)
    assert made.line == pytest.approx(0.9)
    assert made.pick is not None and made.closest is None
    assert made.points[made.pick].name == "r1 student-8bit"
    assert [point.name for point in made.points].count("teacher") == 1
    assert {point.model for point in made.points} == {"teacher", "student", "student-8bit", "student-4bit"}
    higher = of(HALF, THIRD, share=0.94)
    assert higher.pick is not None and higher.points[higher.pick].name == "r0 student-8bit"
    lower = of(HALF, THIRD, share=0.5)  # on the line is good enough
    assert lower.pick is not None and lower.points[lower.pick].name == "r1 student-4bit"


def test_where_none_is_above_the_best_is_named() -> None:
    made = of(HALF, THIRD, share=0.99)
    assert made.pick is None and made.closest is not None
    assert made.points[made.closest].name == "r0 student"
    said = sentence(made)
    assert said.startswith(
        "No model reaches 99 % of the teacher's pass@1 (99.0 %); r0 student comes closest: "
    )
    assert said.endswith("pass@1 95.0 %, 2.00 MiB (50 % of the teacher), 10.0 ms a token.")


def test_the_sentence_says_what_the_pick_costs_and_how_sure_it_is() -> None:
    assert sentence(of(HALF, THIRD)) == (
        "The smallest model with 90 % of the teacher's pass@1 (90.0 %) is r1 student-8bit: pass@1 91.0 %, "
        "0.30 MiB (7.5 % of the teacher), 10.0 ms a token."
    )
    unsure = {**THIRD, "student-8bit": THIRD["student-8bit"] | {"pass@1_stderr": 0.02}}
    assert sentence(of(HALF, unsure)).endswith("; its score is within two standard errors of the line.")
    sure = {**THIRD, "student-8bit": THIRD["student-8bit"] | {"pass@1_stderr": 0.004}}
    assert "two standard errors" not in sentence(of(HALF, sure))
    joules = {**THIRD, "student-8bit": THIRD["student-8bit"] | {"joules_per_token": 0.25}}
    assert sentence(of(HALF, joules)).endswith("10.0 ms a token, 0.25 J a token.")


@pytest.mark.parametrize("teacher", [found(4.0, 0.0), found(4.0, None)])
def test_a_teacher_without_a_score_draws_no_line(teacher: dict[str, Any]) -> None:
    made = of({**HALF, "teacher": teacher})
    assert made.line is None and made.pick is None
    assert sentence(made) == "Nothing can be picked: the teacher has no positive pass@1."
    assert sentence(of({"teacher": TEACHER})) == "Nothing can be picked: no student has a pass@1."


def test_first_choices_of_the_teacher_are_its_own() -> None:
    models = {"teacher": {"size_mib": 4.0}, "student": {"size_mib": 1.0, "top1_agreement": 0.95}}
    made = of(models, score="top1_agreement")
    assert made.line == pytest.approx(0.9)
    assert made.pick is not None


def test_every_front_is_of_its_own_cost() -> None:
    fast = {**HALF, "student-8bit": found(0.5, 0.94, 10.0)}
    made = of(fast)
    assert made.front["size"] == [True, True, True, True]
    assert made.front["latency"] == [True, True, False, False]  # as fast, and worse, or slower
    assert made.front["energy"] == [None] * 4


def test_teachers_that_are_others_are_points_of_their_own() -> None:
    small = {**THIRD, "teacher": found(1.0, 0.97)}
    runs = [Measured("a", HALF, None, "embedded"), Measured("b", small, None, "embedded, 4 bits")]
    made = frontier(runs, "pass@1", 0.9)
    assert [(point.run, point.model) for point in made.points][:2] == [("a", "teacher"), ("b", "teacher")]
    assert made.line == pytest.approx(0.9)  # of the first
    assert made.pick is not None and made.points[made.pick].model != "teacher"


@pytest.fixture
def written(tmp_path: Path) -> tuple[Frontier, dict[str, Any], str]:
    pytest.importorskip("matplotlib")
    made = of(HALF, THIRD)
    records = [read_run(make_run(tmp_path / f"r{i}", f"r{i}", m)) for i, m in enumerate((HALF, THIRD))]
    (tmp_path / "x-frontier").mkdir()
    page = write_frontier(tmp_path / "x-frontier", made, records, "x-frontier")
    tree = json.loads((tmp_path / "x-frontier" / "frontier.json").read_text(encoding="utf-8"))
    return made, tree, page.read_text(encoding="utf-8")


def test_the_file_holds_every_point(written: tuple[Frontier, dict[str, Any], str]) -> None:
    made, tree, _ = written
    assert (tree["schema"], tree["score"], tree["runs"]) == (1, "pass@1", ["r0", "r1"])
    assert tree["line"] == {"share": 0.9, "score": 0.9}
    assert tree["pick"] == {"run": "r1", "model": "student-8bit"} and tree["closest"] is None
    assert tree["sentence"] == sentence(made)
    assert len(tree["points"]) == len(made.points) == 7
    for point in tree["points"]:
        assert point["ms_per_token"] == pytest.approx(1e3 / point["decode_tokens_per_second"])
        assert point["joules_per_token"] is None and point["joules_per_token_why"]
        assert point["front"]["energy"] is None
    first, second = tree["points"][:2]
    assert (first["model"], first["ratio"], second["ratio"]) == ("teacher", None, 0.5)
    assert second["size_gib"] == pytest.approx(2 / 1024)


def test_the_page_draws_what_was_measured_and_says_why_not(
    written: tuple[Frontier, dict[str, Any], str],
) -> None:
    made, _, html = written
    page = Page(html)
    assert html.count("<svg") == 2
    assert "Not drawn: its energy was not measured." in page.text
    assert "What quality costs" in page.text and html.index("<svg") < html.index("All models")
    exact = [tag["value"] for name, tag in page.tags if name == "data"]
    assert "0.94" in exact and "0.0" not in exact
    assert sentence(made).split(":")[0].replace(" %", "\u00a0%") in page.text
    highlighted = html[html.index('<tr class="student">') :]
    assert highlighted.index("r1 student-8bit") < 120
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link")]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_without_matplotlib_the_page_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_frontier(tmp_path, of(HALF), [], "x").read_text(encoding="utf-8")
    assert "pip install &#39;mlx-distill[report]&#39;" in page and "r0 student-4bit" in page


def test_the_console_has_a_line_a_model_and_the_sentence() -> None:
    made = of(HALF, THIRD)
    head, *rows, empty, said = console_lines(made)
    assert "size, MiB" in head and "pass@1, %" in head and "ms per token" in head
    assert [row.startswith("> ") for row in rows] == [i == made.pick for i in range(len(rows))]
    assert len(rows) == 7 and (empty, said) == ("", sentence(made))
    assert rows[0].split()[:4] == ["teacher", "1,000", "4.00", "100.0"]
    assert len({row.index(".") for row in rows}) == 1, "sizes stand below each other"


def test_sizes_are_in_gib_where_models_are_large() -> None:
    large = {"teacher": found(8192.0, 1.0), "student": found(2048.0, 0.95)}
    made = of(large)
    assert "size, GiB" in console_lines(made)[0]
    assert "2.00 GiB (25 % of the teacher)" in sentence(made)
    assert as_tree(made, [], "x")["points"][1]["size_gib"] == 2.0
