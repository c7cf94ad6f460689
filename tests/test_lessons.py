"""What the student learns from, in which batches, and which recipes are refused for it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workshop
from tiny import tiny_recipe

from mlx_distill import recipe
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches
from mlx_distill.data.drawn import DrawnBatches
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.lessons import labels, lessons, make_batches
from mlx_distill.plan import plan_lines
from mlx_distill.preflight import prepare
from mlx_distill.run import Run
from mlx_distill.work import Work

DATA: dict[str, Any] = {"train": "good.jsonl", "prompts": "good.jsonl", "max_tokens": 64}
REPLAY = [{"source": "old.jsonl"}, {"source": "older.jsonl", "rows": 3}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workshop, with two sources to replay."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name, count in (("old", 5), ("older", 7)):
        rows = [{"prompt": f"def {name}({i}):", "completion": f" return {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return tmp_path


def work_of(folder: Path, **sections: Any) -> Work:
    options = tiny_recipe(**{"teacher": {"model": "teacher"}, "data": DATA, **sections})
    runs = folder / "run"
    (runs / "samples").mkdir(parents=True, exist_ok=True)
    work = Work(Run(runs, Console(io.StringIO())), options, prepare(options))
    lines = [
        {"row": i, "sample": 0, "answer": " return x", "tokens": [70 + i], "end": 1, "kept": i % 3 > 0}
        for i in range(len(work.prepared.prompts))
    ]
    work.run.write_rows("generated", lines)
    return work


def test_replayed_rows_are_labels_and_answers_come_last(folder: Path) -> None:
    work = work_of(folder, data={**DATA, "replay": REPLAY})
    found, alone = lessons(work), labels(work)
    assert found.sources == ["train"] * 12 + ["replay.0"] * 5 + ["replay.1"] * 3 + ["prompts"] * 8
    assert alone.sources == found.sources[:20]
    assert alone.encoded == found.encoded[:20]
    assert found.prompts == [None] * 20 + [i for i in range(12) if i % 3]
    assert [row.prompt for row in found.rows[12:20]] == [f"def old({i}):" for i in range(5)] + [
        f"def older({i}):" for i in range(3)
    ]
    for row, encoded, prompt in zip(found.rows[20:], found.encoded[20:], found.prompts[20:], strict=True):
        assert prompt is not None
        assert row.prompt == work.prepared.prompts[prompt].row.prompt
        assert encoded.tokens[-2:] == [70 + prompt, 1]


def test_without_replay_all_is_as_it_was(folder: Path) -> None:
    found = lessons(work_of(folder))
    assert found.sources == ["train"] * 12 + ["prompts"] * 8


def test_a_plain_string_is_a_source_to_replay(folder: Path) -> None:
    listed = tiny_recipe(data={**DATA, "replay": ["old.jsonl", {"source": "older.jsonl"}]})
    assert [source.source for source in listed.data.replay] == ["old.jsonl", "older.jsonl"]
    again = recipe.decode(recipe.yaml.safe_load(recipe.dump(listed)))
    assert again == listed


def test_what_is_replayed_is_part_of_the_fingerprint(folder: Path) -> None:
    data = {**DATA, "replay": REPLAY}
    before = work_of(folder, data=data).prepared.fingerprint
    assert work_of(folder, data=data).prepared.fingerprint == before
    rows = (folder / "old.jsonl").read_text(encoding="utf-8").replace("return 4", "return 5")
    (folder / "old.jsonl").write_text(rows, encoding="utf-8")
    assert work_of(folder, data=data).prepared.fingerprint != before


def test_replayed_rows_that_are_too_long_are_left_out_or_refused(folder: Path) -> None:
    long = {"prompt": "x" * 300, "completion": "y"}
    with open(folder / "old.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    work = work_of(folder, data={**DATA, "replay": REPLAY})
    assert work.prepared.dropped["replay.0"] == 1
    assert len(work.prepared.replay["replay.0"][1]) == 5
    (folder / "old.jsonl").write_text(json.dumps(long) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"`data\.replay\.0`: every row is longer"):
        work_of(folder, data={**DATA, "replay": REPLAY})
    (folder / "old.jsonl").write_text('{"prompt": "no answer"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"old\.jsonl:1: no answer"):
        work_of(folder, data={**DATA, "replay": REPLAY})


def test_without_weights_and_curriculum_batches_are_the_plain_ones(folder: Path) -> None:
    work = work_of(folder, data={**DATA, "replay": REPLAY})
    found = make_batches(lessons(work), work.recipe)
    assert isinstance(found, Batches)
    plain = Batches(lessons(work).encoded, 256, 0)
    assert [found[i].rows for i in range(20)] == [plain[i].rows for i in range(20)]


def test_weights_set_the_shares_of_sources(folder: Path) -> None:
    replay = [{**REPLAY[0], "weight": 0.4}, REPLAY[1]]
    work = work_of(folder, data={**DATA, "replay": replay}, train={"steps": 40, "micro_batches": 3})
    learned = lessons(work)
    batches = make_batches(learned, work.recipe)
    assert isinstance(batches, DrawnBatches)
    assert len(batches) == 120
    drawn = [learned.sources[i] for at in range(120) for i in batches[at].rows]
    shares = {source: drawn.count(source) / len(drawn) for source in set(drawn)}
    # 0.4 by weight; the 12 + 8 + 3 others divide what is left.
    expected = {"replay.0": 0.4, "train": 0.6 * 12 / 23, "prompts": 0.6 * 8 / 23, "replay.1": 0.6 * 3 / 23}
    assert shares == pytest.approx(expected, abs=0.01)
    # The baseline has no answers, and the weight is what it was.
    alone = labels(work)
    batches = make_batches(alone, work.recipe)
    drawn = [alone.sources[i] for at in range(120) for i in batches[at].rows]
    assert drawn.count("replay.0") / len(drawn) == pytest.approx(0.4, abs=0.01)


def test_a_weight_among_absent_sources_leaves_plain_batches(folder: Path) -> None:
    data = {**DATA, "train": {"source": "good.jsonl", "weight": 0.5}}
    work = work_of(folder, data=data)
    assert isinstance(make_batches(lessons(work), work.recipe), DrawnBatches)
    assert isinstance(make_batches(labels(work), work.recipe), Batches)


def test_a_curriculum_orders_the_rows_it_has_difficulties_for(folder: Path) -> None:
    curriculum = {"by": "length", "pace": "sorted"}
    work = work_of(folder, train={"curriculum": curriculum, "steps": 100, "batch_tokens": 64})
    learned = lessons(work)
    difficulty = np.arange(len(learned.rows), dtype=np.float64)[::-1]
    batches = make_batches(learned, work.recipe, difficulty)
    assert np.mean(batches[2].rows) > 16
    assert np.mean(batches[97].rows) < 3
    assert isinstance(make_batches(labels(work), work.recipe), Batches)  # the baseline has none


def test_the_plan_names_what_is_replayed(folder: Path) -> None:
    data = {**DATA, "replay": [{"source": "old.jsonl", "weight": 0.4}]}
    lines = list(plan_lines(tiny_recipe(teacher={"model": "teacher"}, data=data)))
    assert any(line.startswith("data.replay.0: 5 rows, ") for line in lines)
    assert "data.replay.0: drawn with weight 0.4 among the rows to learn from" in lines


def mistake(**sections: Any) -> str:
    with pytest.raises(RecipeError) as found:
        tiny_recipe(**{"data": {"train": "good.jsonl", "prompts": "good.jsonl"}, **sections})
    assert len(str(found.value).splitlines()) == 1
    return str(found.value).removeprefix("recipe: ")


def source(**options: Any) -> dict[str, Any]:
    return {"source": "good.jsonl", **options}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": source(weight=0.5)}, "`data.train.weight` is a share among sources, and there is one"),
        ({"valid": source(weight=0.5)}, "`data.valid.weight` is a share of the rows to learn from, and"),
        (
            {"replay": [source(weight=0.7), source(weight=0.3)]},
            "`data`: the weights add up to 1 and leave no rows for `data.train`",
        ),
        ({"replay": [source(weight=0)]}, "`data.replay.0.weight`: greater than 0; got 0"),
        ({"replay": [source(wieght=1)]}, "unknown key `data.replay.0.wieght`; did you mean"),
        ({"replay": "good.jsonl"}, "`data.replay`: a list; got 'good.jsonl'"),
    ],
)
def test_weights_that_say_nothing_are_refused(data: dict[str, Any], said: str) -> None:
    plain = {"train": "good.jsonl", **data}
    assert mistake(data=plain).startswith(said)


def test_weights_of_all_sources_are_ratios() -> None:
    data = {"train": source(weight=3.0), "replay": [source(weight=1.0)]}
    assert tiny_recipe(data=data).data.replay[0].weight == 1.0


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"by": "teacher_nll", "teacher": None, "objective": {"cross_entropy": {}}},
            "`train.curriculum.by` teacher_nll is measured under the teacher; name a `teacher`",
        ),
        ({"by": "student_loss"}, "`train.curriculum.by` student_loss is measured before training, when"),
        (
            {
                "by": "teacher_nll",
                "teacher": {"model": "student", "ema": 0.9},
                "student": {"tokenizer": {"pieces": 200}},
            },
            "`train.curriculum.by` teacher_nll is measured before training, when",
        ),
        (
            {"by": "pass_rate"},
            "`train.curriculum.by` pass_rate is a share of right answers to `data.prompts`",
        ),
        ({"by": "length", "pace": "sorted", "start": 0.3}, "`train.curriculum.start` is for pace competence"),
        ({"by": "length", "pace": "weighted", "until": 0.3}, "`train.curriculum.until` is for pace comp"),
        (
            {"by": "length", "generate": {"on_policy": {}}, "objective": {"forward_kl": {}}},
            "`train.curriculum` chooses among rows of the data, and the student learns from its own alone",
        ),
    ],
)
def test_difficulties_that_cannot_be_measured_are_refused(sections: dict[str, Any], said: str) -> None:
    curriculum = {key: sections.pop(key) for key in ("by", "pace", "start", "until") if key in sections}
    data = {"train": "good.jsonl"}
    if sections.get("teacher", "") is None:
        sections["student"] = {"tokenizer": {"pieces": 200}}
    assert mistake(data=data, train={"curriculum": curriculum}, **sections).startswith(said)
