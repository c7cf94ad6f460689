"""`mlx-distill compress`: a run a ratio, a model a width, what they share, and what is refused before any."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import workshop
from workshop import command, contents

from mlx_distill import answers, recipe
from mlx_distill.compress import derived
from mlx_distill.errors import Stopped
from mlx_distill.evaluate import stage as evaluation
from mlx_distill.generate import Answer
from mlx_distill.recipe import Recipe

FAST = [
    "train={steps: 2, batch_tokens: 256, learning_rate: 1e-2, compile: false, save_every: 0, log_every: 0}",
    "evaluate={tasks: [fidelity], baseline: false}",
    "export.formats=[]",
    "quantize.group_size=32",
]
CUT = "student={prune: {ratio: 0.9, axes: [feed_forward], tokens: 300}}"
SIZES = "compress={ratios: [0.85, 0.7], bits: [8, 4]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


def frontier_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / f"{name}-frontier" / "frontier.json").read_text(encoding="utf-8"))


def stages_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "stages.json").read_text(encoding="utf-8"))


def test_every_ratio_is_a_run_and_every_width_a_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = command(folder, capsys, "compress", "recipe.yaml", *FAST, CUT, SIZES)
    assert ended.code == 0, ended.err
    tree = frontier_of(folder, "tiny")
    assert tree["runs"] == ["tiny-r0.85", "tiny-r0.70"]
    found = {(point["run"], point["model"]): point for point in tree["points"]}
    wanted = [(run, f"student{bits}") for run in tree["runs"] for bits in ("", "-8bit", "-4bit")]
    assert list(found) == [("tiny-r0.85", "teacher"), *wanted]
    for run in tree["runs"]:
        models = json.loads((folder / "runs" / run / "evaluation.json").read_text(encoding="utf-8"))["models"]
        assert found[run, "student"]["parameters"] == models["student"]["parameters"]
        assert found[run, "student-4bit"]["size_gib"] == models["student-4bit"]["size_mib"] / 1024
        assert found[run, "student-8bit"]["kl"] == models["student-8bit"]["kl"]
        assert found[run, "student"]["top1_agreement"] == models["student"]["top1_agreement"]
    sizes = [found[run, "student"]["parameters"] for run in tree["runs"]]
    whole = found["tiny-r0.85", "teacher"]["parameters"]
    assert whole > sizes[0] > sizes[1] and sizes[1] <= 0.7 * whole
    assert all(point["ms_per_token"] is None and point["ms_per_token_why"] for point in tree["points"])
    assert tree["line"]["score"] == 0.9, "of a teacher whose first choices are its own"
    made = recipe.load(folder / "runs" / "tiny-r0.70" / "recipe.yaml")
    assert made.compress is None and made.quantize is not None and made.quantize.bits == [8, 4]
    said = ended.out.splitlines()
    assert said[-2] == tree["sentence"] and said[-1] == "frontier: runs/tiny-frontier/frontier.html"
    assert sum(line.startswith("  tiny-r") for line in said) == 6


def test_finished_runs_are_not_repeated_and_another_width_is_added(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", "recipe.yaml", "name=more", *FAST, CUT]
    assert command(folder, capsys, *arguments, "compress={ratios: [0.7], bits: [8]}").code == 0
    before = (folder / "runs/more-r0.70/models/student/model.safetensors").stat().st_mtime_ns
    refused = command(folder, capsys, *arguments, "compress={ratios: [0.7], bits: [8]}")
    assert (refused.code, len(refused.err)) == (2, 1)
    assert "runs/more-r0.70 holds a run already: go on with --resume" in refused.err[0]
    again = command(folder, capsys, *arguments, "compress={ratios: [0.7], bits: [8, 3]}", "--resume")
    assert again.code == 0, again.err
    after = (folder / "runs/more-r0.70/models/student/model.safetensors").stat().st_mtime_ns
    assert before == after, "the student is not trained again"
    assert [point["model"] for point in frontier_of(folder, "more")["points"]] == [
        "teacher",
        "student",
        "student-8bit",
        "student-3bit",
    ]


def test_a_stopped_compress_goes_on_where_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compress", "recipe.yaml", "name=parts", *FAST, CUT, SIZES]
    plain, calls = evaluation.evaluate_models, list[str]()

    def stopped(work: Any) -> dict[str, Any]:
        calls.append(work.recipe.name)
        if len(calls) == 2:
            raise Stopped("the drive is full; make room, then go on")
        return plain(work)

    monkeypatch.setattr("mlx_distill.pipeline.evaluate_models", stopped)
    ended = command(folder, capsys, *arguments)
    assert ended.code == 75
    assert ended.err[0].startswith("go on with: mlx-distill compress recipe.yaml name=parts")
    assert ended.err[0].endswith(" --resume")
    assert not (folder / "runs" / "parts-frontier").exists()
    first = stages_of(folder, "parts-r0.85")
    assert "evaluate" in first and "evaluate" not in stages_of(folder, "parts-r0.70")
    assert command(folder, capsys, *arguments, "--resume").code == 0
    assert calls == ["parts-r0.85", "parts-r0.70", "parts-r0.70"]
    assert stages_of(folder, "parts-r0.85") == first
    tree, whole = frontier_of(folder, "parts"), frontier_of(folder, "tiny")
    assert [p["kl"] for p in tree["points"][1:]] == [p["kl"] for p in whole["points"][1:]]


def test_overwrite_starts_all_runs_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", "recipe.yaml", "name=anew", *FAST, CUT, "compress={ratios: [0.7]}"]
    assert command(folder, capsys, *arguments).code == 0
    more = "compress={ratios: [0.85, 0.7]}"
    other = command(folder, capsys, *arguments, more, "seed=1", "--resume")
    assert other.code == 2 and "was made by another recipe (`seed` was 0 and is 1)" in other.err[0]
    assert not (folder / "runs" / "anew-r0.85").exists(), "the first of them has not begun"
    (folder / "runs" / "anew-r0.70" / "mark").touch()
    assert command(folder, capsys, *arguments, "seed=1", "--overwrite").code == 0
    assert not (folder / "runs" / "anew-r0.70" / "mark").exists()


def test_a_list_of_recipes_is_compared_and_one_without_sizes_runs_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = workshop.RECIPE.replace("name: tiny", "name: other")
    (folder / "other.yaml").write_text(text, encoding="utf-8")
    plain = recipe.load(folder / "other.yaml")
    assert list(derived(plain)) == [plain]
    (folder / "sized.yaml").write_text(
        workshop.RECIPE.replace("tiny", "sized") + "compress: {bits: [4]}\n", encoding="utf-8"
    )
    ended = command(folder, capsys, "compress", "other.yaml", "sized.yaml", *FAST[:3])
    assert ended.code == 2 and "64 does not divide" in ended.err[0], "the groups of a `quantize` of its own"
    ended = command(folder, capsys, "compress", "other.yaml", "sized.yaml", *FAST)
    assert ended.code == 0, ended.err
    tree = frontier_of(folder, "sized")
    assert tree["runs"] == ["other", "sized"]
    assert [(p["run"], p["model"]) for p in tree["points"]] == [
        ("other", "teacher"),
        ("other", "student"),
        ("other", "student-4bit"),
        ("sized", "student"),
        ("sized", "student-4bit"),
    ]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A teacher whose answers are one token long; how many prompts it was asked, call by call."""
    asked = list[int]()

    def one_token(model: Any, prompts: Any, stop: set[int], **_: Any) -> list[Answer]:
        asked.append(len(prompts))
        return [Answer([7], True, min(stop)) for _ in prompts]

    monkeypatch.setattr(answers, "generate", one_token)
    return asked


WRITING = ["data={prompts: good.jsonl, test: good.jsonl, max_tokens: 128}", *FAST, CUT, SIZES]


def test_the_teacher_writes_its_answers_once(
    folder: Path, capsys: pytest.CaptureFixture[str], written: list[int]
) -> None:
    ended = command(folder, capsys, "compress", "recipe.yaml", "name=once", *WRITING)
    assert ended.code == 0, ended.err
    assert written == [12]
    first, second = (folder / "runs" / f"once-r0.{size}" / "samples" for size in ("85", "70"))
    assert (first / "generated.jsonl").read_bytes() == (second / "generated.jsonl").read_bytes()
    # The same run without the other beside it asks for its own, and learns from the very same rows.
    shutil.copytree(folder / "runs" / "once-r0.70", folder / "runs" / "kept")
    alone = ["run", "runs/kept/recipe.yaml", "--overwrite"]
    assert command(folder, capsys, *alone).code == 0
    assert written == [12, 12]
    weights = Path("models", "student", "model.safetensors")
    assert (folder / "runs/once-r0.70" / weights).read_bytes() == (
        folder / "runs/kept" / weights
    ).read_bytes()


def test_a_cache_is_filled_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_distill.cache import stage

    plain, read = stage.fill, list[Path]()

    def counting(store: Any, *arguments: Any, **how: Any) -> int:
        read.append(store.folder)
        return plain(store, *arguments, **how)

    monkeypatch.setattr(stage, "fill", counting)
    cached = ["teacher={model: teacher, source: cache, top_k: 8}", "objective={forward_kl: }"]
    ended = command(folder, capsys, "compress", "recipe.yaml", "name=stored", *FAST, CUT, SIZES, *cached)
    assert ended.code == 0, ended.err
    assert read == [Path("runs/stored-r0.85/cache/teacher")]
    made = recipe.load(folder / "runs" / "stored-r0.70" / "recipe.yaml")
    assert made.teacher is not None and made.teacher.cache == "runs/stored-r0.85/cache/teacher"
    assert command(folder, capsys, "run", "runs/stored-r0.70/recipe.yaml", "--resume").code == 0


def loaded(folder: Path, *overrides: str) -> Recipe:
    return recipe.load(folder / "recipe.yaml", overrides)


def test_names_of_ratios_are_apart(folder: Path) -> None:
    made = list(derived(loaded(folder, *FAST, CUT, "compress={ratios: [0.5, 0.125, 0.13]}")))
    assert [one.name for one in made] == ["tiny-r0.50", "tiny-r0.125", "tiny-r0.13"]
    assert [one.student.prune and one.student.prune.ratio for one in made] == [0.5, 0.125, 0.13]


def test_widths_make_a_section_of_their_own(folder: Path) -> None:
    [made] = derived(loaded(folder, "compress={bits: [8, 3]}", "student={model: student}"))
    assert made.name == "tiny" and made.quantize is not None
    assert (made.quantize.method, made.quantize.bits) == ("rtn", [8, 3])


WRONG = {
    "unknown score": (
        ["compress={score: pass_1}"],
        "`compress.score`: one of pass@1, pass@5, pass@10, humaneval_pass@1, "
        "humaneval_pass@5, humaneval_pass@10, mbpp_pass@1, mbpp_pass@5, mbpp_pass@10, exact_match, accuracy, "
        "accuracy_normalised, "
        "rougeL, rouge1, rouge2, top1_agreement; got 'pass_1'",
    ),
    "a score that is lower where better": (
        ["compress={score: kl}"],
        "`compress.score` kl is no score of which",
    ),
    "a score that is not measured": (
        ["compress={score: pass@1}"],
        "`compress.score` pass@1 needs code in `evaluate.tasks` [fidelity]; add it",
    ),
    "too few answers": (
        ["compress={score: pass@5}", "evaluate={tasks: [code], temperature: 1, samples: 4}"],
        "pass@5 needs 5 `evaluate.samples`; got 4",
    ),
    "no score": (
        ["compress={bits: [4]}", "evaluate.tasks=[speed]"],
        "[speed] give none; add fidelity or code",
    ),
    "ratios without prune": (
        ["compress={ratios: [0.5]}"],
        "`compress.ratios` are targets of `student.prune`, which is missing; add {ratio: 0.5}, or drop them",
    ),
    "two targets": (
        ["compress={ratios: [0.5]}", "student={prune: {parameters: 30000}}"],
        "`compress.ratios` are targets, and `student.prune.parameters` is another",
    ),
    "a ratio twice": (
        ["compress={ratios: [0.5, 0.5]}", CUT],
        "`compress`: `ratios` names 0.5 twice; drop one",
    ),
    "a width twice": (["compress={bits: [4, 8, 4]}"], "`compress`: `bits` names 4 twice; drop one"),
    "no such width": (["compress={bits: [7]}"], "`compress.bits.0`: one of 2, 3, 4, 5, 6, 8; got 7"),
    "nothing to keep": (["compress={line: 0}"], "`compress.line`: greater than 0; got 0"),
    "widths of a mode": (
        ["compress={bits: [8, 4]}", "quantize={mode: mxfp4}"],
        "`compress.bits`: `quantize.mode` mxfp4 has a width of its own; use affine, or drop them",
    ),
    "a size and widths": (
        ["compress={bits: [8, 4]}", "quantize={mixed: [4, 8], gib: 0.001, group_size: 32}"],
        "`compress.bits` and `quantize.gib` both say how small",
    ),
    "no teacher": (
        ["compress={bits: [4]}", "teacher=null", "objective={cross_entropy: }", "student={model: student}"],
        "`compress.line` is a share of the teacher's score; name a `teacher`",
    ),
    "no compress section": ([], "no `compress` section in wrong; add one, such as compress: {bits: [8, 4]}"),
    "only overrides": (
        ["compress={bits: [4]}"],
        "name a recipe to compress; all that is given are overrides",
    ),
    "a ratio that leaves nothing": (
        [CUT, "compress={ratios: [0.85, 0.01]}"],
        "`student.prune.ratio` 0.01",
    ),
    "both": ([CUT, SIZES, "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_the_first_run(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, told = WRONG[case]
    recipes = [] if case == "only overrides" else ["recipe.yaml"]
    before = contents(folder)
    ended = command(folder, capsys, "compress", *recipes, "name=wrong", *FAST, *arguments)
    assert (ended.code, len(ended.err)) == (2, 1), ended
    assert told in ended.err[0]
    assert contents(folder) == before


def test_recipes_that_cannot_be_compared_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sized = workshop.RECIPE + "compress: {bits: [4]}\n"
    (folder / "one.yaml").write_text(sized.replace("tiny", "one"), encoding="utf-8")
    rows = (folder / "good.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "few.jsonl").write_text("\n".join(rows[:5]), encoding="utf-8")
    others = {
        "same.yaml": (sized.replace("tiny", "one"), "two runs would have the name one"),
        "frontier.yaml": (sized.replace("tiny", "one-frontier"), "two runs would have the name one-frontier"),
        "line.yaml": (sized.replace("[4]}", "[4], line: 0.5}"), "one and tiny differ in `score` or `line`"),
        "rows.yaml": (sized.replace("test: good", "test: few"), "`data.test` of one and tiny are other rows"),
    }
    for name, (text, told) in others.items():
        (folder / name).write_text(text, encoding="utf-8")
        before = contents(folder)
        ended = command(folder, capsys, "compress", "one.yaml", name, *FAST)
        assert (ended.code, len(ended.err)) == (2, 1), name
        assert told in ended.err[0], (name, ended.err)
        assert contents(folder) == before
    (folder / "blind.yaml").write_text(
        workshop.RECIPE.replace("tiny", "blind") + "evaluate: {tasks: [speed]}\n", encoding="utf-8"
    )
    ended = command(folder, capsys, "compress", "one.yaml", "blind.yaml", "quantize.group_size=32")
    assert "blind: the score top1_agreement, by which all are compared, needs fidelity" in ended.err[0]


def test_a_folder_that_is_taken_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "mine-frontier").mkdir(parents=True)
    (folder / "runs" / "mine-frontier" / "thesis.txt").write_text("years of work", encoding="utf-8")
    ended = command(folder, capsys, "compress", "recipe.yaml", "name=mine", *FAST, CUT, SIZES)
    assert ended.code == 2 and "runs/mine-frontier holds other files" in ended.err[0]
    assert not (folder / "runs" / "mine-r0.85").exists()


def test_prune_stops_behind_the_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(folder, capsys, "prune", "recipe.yaml", "name=cut", *FAST, CUT)
    assert ended.code == 0, ended.err
    assert list(stages_of(folder, "cut")) == ["generate", "score", "cache", "prune"]
    models = {path.name for path in (folder / "runs" / "cut" / "models").iterdir()}
    assert models == {"pruned"}
    again = command(folder, capsys, "prune", "recipe.yaml", "name=cut", *FAST, CUT, "--resume")
    assert again.code == 0 and "cut out" not in again.out
