"""The generate stage: blocks that survive anything, and answers that are dropped for a reason or learned."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe
from workshop import REPOSITORY

from mlx_distill import answers, files, models, recipe
from mlx_distill.answers import generate_answers
from mlx_distill.asked import Asked
from mlx_distill.blocks import Begun, read_block, split, write_block
from mlx_distill.console import Console
from mlx_distill.data import pocket
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, RecipeError, Stopped
from mlx_distill.interrupt import Interrupts
from mlx_distill.lessons import lessons
from mlx_distill.options import Generate
from mlx_distill.pipeline import resumable_if_full
from mlx_distill.preflight import prepare
from mlx_distill.report_lineage import counted
from mlx_distill.run import Run
from mlx_distill.runaway import RunawayAlarm
from mlx_distill.work import Work
from mlx_distill.written import Written

RECIPE = """
name: written
student: {shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}
teacher: {model: embedded}
data: {prompts: asked.jsonl, max_tokens: 128}
generate: {max_tokens: 40, batch_size: 4, temperature: 2.0, top_k: 20, samples: 2}
objective: {cross_entropy: {}}
train: {steps: 2, batch_tokens: 256, learning_rate: 1e-2}
evaluate: {tasks: []}
"""
GENERATED = ["generated.jsonl", "generated.jsonl.sha256"]


class Lines:
    """A stream that keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions for the embedded teacher, and a recipe that has it answer them twice each."""
    root = tmp_path_factory.mktemp("answers")
    asked = [{"prompt": row.prompt, "tests": row.tests} for row in pocket.rows("code", "train", 20)]
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return root


class Wrote:
    """What a stage left."""

    def __init__(self, work: Work, result: dict[str, Any], said: str):
        self.work, self.result, self.said = work, result, said
        self.samples = work.run.folder / "samples"

    @property
    def bytes(self) -> dict[str, bytes]:
        found = [path for path in self.samples.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.samples)): path.read_bytes() for path in found}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.work.run.read_rows("generated")


def write(
    folder: Path, runs: Path, *overrides: str, blocks_of: int = 2, change: dict[str, Any] | None = None
) -> Wrote:
    """Do the stage in the run folder `runs`, with blocks of so many batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(answers, "BATCHES", blocks_of)
        patch.setattr(answers, "SERVED", 4 * blocks_of)
        for name, value in (change or {}).items():
            patch.setattr(name, value)
        options, stream = recipe.load("recipe.yaml", overrides), Lines()
        runs.mkdir(exist_ok=True)
        work = Work(Run(runs, Console(stream), Interrupts()), options, prepare(options))  # type: ignore[arg-type]
        return Wrote(work, generate_answers(work), stream.text)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Wrote:
    """An undisturbed run."""
    return write(folder, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Wrote, tmp_path: Path) -> Path:
    shutil.copytree(whole.work.run.folder, tmp_path / "copy")
    return tmp_path / "copy"


def refuse_to_load(*_: Any) -> Any:
    raise AssertionError("weights were read")


def test_every_answer_is_there(whole: Wrote) -> None:
    rows, asked = whole.rows, whole.work.prepared.prompts
    assert [(row["row"], row["sample"]) for row in rows] == [(i, k) for i in range(20) for k in range(2)]
    assert all(row["prompt"] == asked[row["row"]].row.prompt for row in rows)
    assert all(row["finished"] == (row["end"] is not None) for row in rows)
    assert all(row["kept"] == (row["reason"] is None) for row in rows)
    kept = sum(row["kept"] for row in rows)
    dropped = len(rows) - kept
    assert kept > dropped > 0
    assert whole.result == {
        "written": 40,
        "kept": kept,
        "dropped": {"unfinished within 40 tokens": dropped},
    }
    pairs = [(rows[i]["tokens"], rows[i + 1]["tokens"]) for i in range(0, 40, 2)]
    assert sum(one != other for one, other in pairs) > 10  # samples of one prompt are drawn apart
    told = f"teacher answers: {kept} of 40 kept (dropped: {dropped} unfinished within 40 tokens)"
    assert whole.said.splitlines()[-1] == told
    assert sorted(whole.bytes) == [*GENERATED, *(f"written/{n:05d}.jsonl" for n in range(5))]


def test_what_was_written_is_learned(whole: Wrote) -> None:
    learned, kept = lessons(whole.work), [row for row in whole.rows if row["kept"]]
    assert len(learned.rows) == len(kept)
    for row, encoded, prompt, line in zip(learned.rows, learned.encoded, learned.prompts, kept, strict=True):
        asked = whole.work.prepared.prompts[line["row"]]
        assert encoded.tokens == [*asked.tokens, *line["tokens"], line["end"]]
        assert encoded.start == len(asked.tokens)
        assert (row.completion, prompt) == (line["answer"], line["row"])


def test_blocks_and_batches_leave_what_is_written_alone(folder: Path, whole: Wrote, tmp_path: Path) -> None:
    found = write(folder, tmp_path / "run", "generate.batch_size=7", blocks_of=100)
    assert sorted(found.bytes) == [*GENERATED, "written/00000.jsonl"]
    assert found.bytes["generated.jsonl"] == whole.bytes["generated.jsonl"]
    # In another order, each prompt has its own answers still.
    rows = (folder / "asked.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "turned.jsonl").write_text("".join(rows[::-1]), encoding="utf-8")
    turned = write(folder, tmp_path / "turned", "data.prompts=turned.jsonl").rows
    assert [row["tokens"] for row in turned[::2]] == [row["tokens"] for row in whole.rows[::2]][::-1]


@pytest.mark.parametrize("damage", ["gone", "cut off", "cut at a line", "changed", "another's", "no text"])
def test_a_damaged_block_is_written_again(damage: str, folder: Path, whole: Wrote, copy: Path) -> None:
    path = copy / "samples" / "written" / "00002.jsonl"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut off": data[: len(data) // 2],
                "cut at a line": data[: data.rindex(b"\n", 0, -1) + 1],
                "changed": data.replace(b'"finished": true', b'"finished": false', 1),
                "another's": (path.parent / "00001.jsonl").read_bytes(),
                "no text": b"\xff" * len(data),
            }[damage]
        )
    (copy / "samples" / "generated.jsonl").unlink()
    others = {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir() if p != path}
    again = write(folder, copy)
    assert again.bytes == whole.bytes
    assert {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir() if p != path} == others
    assert again.said.splitlines()[0] == "teacher answers: going on, 32 of 40 are written"


def test_whole_blocks_need_no_teacher(
    folder: Path, whole: Wrote, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", refuse_to_load)
    assert write(folder, copy).bytes == whole.bytes


def test_a_full_disk_loses_nothing_that_was_written(
    folder: Path, whole: Wrote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "run" / "samples" / "written"

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and len([*written.glob("*.jsonl")]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", full)
        with pytest.raises(Stopped, match="the drive is full"), resumable_if_full():
            write(folder, tmp_path / "run")
    assert sorted(path.name for path in written.glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl"]
    assert write(folder, tmp_path / "run").bytes == whole.bytes


def test_a_killed_process_goes_on_to_the_same_bytes(folder: Path, whole: Wrote, tmp_path: Path) -> None:
    """Killed once its first block is there, in the middle of the second."""
    here = "import sys, pathlib; sys.path[:0] = sys.argv[1:3]; import test_answers as t; "
    code = here + "t.write(*map(pathlib.Path, sys.argv[3:5]))"
    paths = [REPOSITORY, REPOSITORY / "tests", folder, tmp_path / "killed"]
    running = subprocess.Popen([sys.executable, "-c", code, *map(str, paths)])
    written = tmp_path / "killed" / "samples" / "written"
    while running.poll() is None and not (written / "00000.jsonl").exists():
        time.sleep(0.002)
    running.kill()
    assert running.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert not (written / "00004.jsonl").exists()
    resumed = write(folder, tmp_path / "killed")
    assert "going on" in resumed.said
    assert resumed.bytes == whole.bytes


def test_when_all_is_dropped_the_filters_are_named(folder: Path, tmp_path: Path) -> None:
    few = ["generate.temperature=0", "generate.top_k=null", "generate.samples=1"]
    few.append("data={prompts: {source: asked.jsonl, rows: 3}, max_tokens: 128}")
    with pytest.raises(
        DataError, match=r"none of 3 answers was kept \(dropped: 3 unfinished within 1 tok"
    ) as e:
        write(folder, tmp_path / "a", *few, "generate.max_tokens=1")
    assert "raise `generate.max_tokens`?" in str(e.value)
    assert (tmp_path / "a" / "samples" / "generated.jsonl").read_text(encoding="utf-8").count("\n") == 3
    with pytest.raises(DataError, match=r"dropped: 3 min_tokens\); loosen `generate.filters.min_tokens`\?"):
        write(folder, tmp_path / "b", *few, "generate.filters.min_tokens=39")
    with pytest.raises(DataError, match=r"3 longer than data.max_tokens 28\); raise `data.max_tokens`\?"):
        write(folder, tmp_path / "c", *few, "data.max_tokens=28")


def test_the_best_of_several_is_what_the_teacher_finds_likeliest(folder: Path, tmp_path: Path) -> None:
    found = write(folder, tmp_path / "run", "generate.keep=best")
    assert found.result["kept"] <= 20
    kept = {row["row"]: row for row in found.rows if row["kept"]}
    lost = [row for row in found.rows if (row["reason"] or "").startswith("keep: ")]
    assert found.result["dropped"]["keep"] == len(lost) > 5
    for row in lost:
        other, mine = (answers._nll(found.work)([as_written(found, one)]) for one in (kept[row["row"]], row))
        assert other <= mine + 1e-6


def as_written(found: Wrote, row: dict[str, Any]) -> Written:
    path = found.samples / "one.jsonl"
    asked = found.work.prepared.prompts
    one = Written(
        row["row"], row["sample"], asked[row["row"]].row, row["answer"], row["tokens"], True, end=row["end"]
    )
    write_block(path, [one])
    [again] = read_block(path, [(row["row"], row["sample"])], asked) or []
    path.unlink()
    assert again == one
    return again


def test_nobody_else_writes_where_the_student_answers_all(folder: Path, tmp_path: Path) -> None:
    own = "generate={on_policy: {share: 1.0}}"
    found = write(folder, tmp_path / "run", own, "objective={reverse_kl: }", "teacher={model: embedded}")
    assert found.result == {}
    assert found.bytes == {}
    assert lessons(found.work).rows == []


NOBODY = "is for who answers `data.prompts`, "


def test_options_that_nobody_would_heed_are_refused() -> None:
    more = {
        "samples": 2,
        "temperature": 1.0,
        "system": "x",
        "examples": "x.jsonl",
    }
    with pytest.raises(RecipeError) as error:
        tiny_recipe(generate=more)
    lines = str(error.value).splitlines()
    assert [line.partition("`generate.")[2].partition("`")[0] for line in lines] == [
        "samples",
        "temperature",
        "system",
        "examples",
    ]
    assert all(f"{NOBODY}which are missing; leave it out" in line for line in lines)
    own = {"generate": {"on_policy": {}, "keep": "first"}, "objective": {"reverse_kl": {}}}
    asked = {"data": {"train": {"source": "pocket", "rows": 10}, "prompts": {"source": "pocket", "rows": 10}}}
    with pytest.raises(
        RecipeError, match=f"`generate.keep` {NOBODY}and with `generate.on_policy.share` 1 nobody"
    ):
        tiny_recipe(**own, **asked)


def test_a_report_counts_by_filter_not_by_what_it_measured() -> None:
    reasons = ["repetition: 61 %", "repetition: 70 %", "empty", None]
    rows = [{"kept": reason is None, "reason": reason} for reason in reasons]
    assert counted(rows) == {"written": 4, "kept": 1, "dropped": [("repetition", 2), ("empty", 1)]}


# --- the alarm -----------------------------------------------------------------------------------


def alarm_of(unfinished: Sequence[bool]) -> tuple[list[str], int]:
    """What the alarm says of answers that are done in this order, and how many were when it spoke."""
    stream, spoke = Lines(), 0
    alarm = RunawayAlarm(Console(stream), Generate(max_tokens=9))  # type: ignore[arg-type]
    with alarm.watching(lambda *_, **__: None)("t", len(unfinished), "rows") as advance:
        for done in range(1, len(unfinished) + 1):
            advance(1, tokens_per_second=1.0, unfinished=sum(unfinished[:done]))
            spoke = spoke or (done if stream.text else 0)
    alarm.add([Written(i, 0, Row(prompt="p"), "", [], not one) for i, one in enumerate(unfinished)])
    return stream.text.splitlines(), spoke


def test_the_alarm_speaks_once_and_early() -> None:
    lines, spoke = alarm_of([False] * 10 + [True] * 50)
    assert spoke == 15  # five, and more than a fifth
    assert lines == [
        "33% of the first 15 answers did not end within `generate.max_tokens` 9, and are dropped; "
        "if that is too many, stop, look at the prompts, or raise it"
    ]


@pytest.mark.parametrize("unfinished", [[True] * 4, [False] * 40 + [True] * 10])
def test_the_alarm_keeps_still(unfinished: list[bool]) -> None:
    assert alarm_of(unfinished) == ([], 0)


# --- a server in the teacher's place -------------------------------------------------------------

SERVED = [
    "teacher=null",
    "generate={samples: 2, temperature: 1.0, system: Be short., "
    "endpoint: {url: 'http://127.0.0.1:9/v1', model: m, at_once: 4}}",
    "student={shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}, "
    "tokenizer: {pieces: 400}}",
    "data={prompts: asked.jsonl, train: {source: pocket, rows: 60}, max_tokens: 400}",
]


class Server:
    """Answers in place of `endpoint.write_block`, and breaks down when it has answered `until` questions."""

    def __init__(self, until: int = 1000):
        self.until, self.asked = until, list[tuple[int, int]]()

    def __call__(
        self, options: Generate, rows: Any, *, done: Any, on_answer: Any, **how: Any
    ) -> list[Written]:
        found = dict(done)
        for prompt, row, sample in rows:
            if (prompt, sample) in found:
                continue
            if len(self.asked) == self.until:
                raise ConnectionError("down")
            self.asked.append((prompt, sample))
            refused = "too long" if prompt == 3 else None
            text = "" if refused else f" answer {sample}"
            one = Written(prompt, sample, row, text, [], not refused, 0.5 + sample, refused=refused)
            found[prompt, sample] = one
            on_answer(one)
        return [found[prompt, sample] for prompt, _, sample in rows]


def test_a_server_writes_and_no_answer_is_asked_for_twice(folder: Path, tmp_path: Path) -> None:
    def served(run: str, server: Server) -> Wrote:
        loaded = {"mlx_distill.models.load": refuse_to_load}
        return write(
            folder, tmp_path / run, *SERVED, change={**loaded, "mlx_distill.endpoint.write_block": server}
        )

    first, second = Server(11), Server()
    with pytest.raises(ConnectionError):
        served("run", first)
    begun = tmp_path / "run" / "samples" / "written" / ".00001.jsonl.begun"
    begun.write_bytes(begun.read_bytes() + b'{"row": 5, "sam')  # a kill may cut a line off
    found = served("run", second)
    assert first.asked + second.asked == [(i, k) for i in range(20) for k in range(2)]
    left = served("left", Server())
    assert found.bytes == left.bytes
    assert found.result == {"written": 40, "kept": 38, "dropped": {"refused": 2}}
    assert found.said.splitlines()[-1].startswith("server answers: 38 of 40 kept (dropped: 2 refused)")
    learned = lessons(found.work)
    taught = [
        found.work.prepared.tokenizer.decode(row.tokens[row.start :])
        for row, source in zip(learned.encoded, learned.sources, strict=True)
        if source == "prompts"
    ]
    assert set(taught) == {" answer 0</s>", " answer 1</s>"}


def test_the_server_s_own_numbers_choose_the_best(folder: Path, tmp_path: Path) -> None:
    served = [*SERVED, "generate.keep=best"]
    found = write(folder, tmp_path / "run", *served, change={"mlx_distill.endpoint.write_block": Server()})
    assert {row["sample"] for row in found.rows if row["kept"]} == {0}


# --- blocks --------------------------------------------------------------------------------------


def test_questions_are_cut_into_blocks() -> None:
    assert split(2, 3, 4) == [[(0, 0), (0, 1), (0, 2), (1, 0)], [(1, 1), (1, 2)]]
    assert split(0, 3, 4) == []


def test_text_of_every_kind_comes_back(tmp_path: Path) -> None:
    row = Row(prompt="p")
    texts = ["", "\u2028 \x85 \r\n \t", '"\\', "\ufffd\U0001f600", "a\nb"]
    written = [Written(0, i, row, text, [i], True, end=1) for i, text in enumerate(texts)]
    path, asked = tmp_path / "x" / "00000.jsonl", [Asked(row, [1], [1])]
    write_block(path, written)
    assert read_block(path, [(0, i) for i in range(5)], asked) == written
    assert read_block(path, [(0, i) for i in range(4)], asked) is None
    with Begun(path, asked) as begun:
        for one in written:
            begun.add(one)
    assert list(Begun(path, asked).answers.values()) == written
    write_block(path, written)
    assert [p.name for p in path.parent.iterdir()] == ["00000.jsonl"]
