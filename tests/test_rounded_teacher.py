"""A teacher that is rounded as it is loaded: whoever asks it, or counts it, meets the rounded one."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import workshop
from mlx.utils import tree_flatten
from tiny import SHAPE, tiny_recipe, tiny_tokenizer
from workshop import command, contents

from mlx_distill import models, recipe
from mlx_distill.console import Console
from mlx_distill.data.batch import make_batch
from mlx_distill.memory.models import models_of
from mlx_distill.models import Loaded
from mlx_distill.options import Grid, Shape
from mlx_distill.preflight import prepare
from mlx_distill.quantize import quantized
from mlx_distill.quantize.teacher import in_few_bits
from mlx_distill.run import Run
from mlx_distill.teacher import LiveTeacher
from mlx_distill.work import Work

FAST = [
    "train={steps: 2, batch_tokens: 256, learning_rate: 1e-2, compile: false, save_every: 0, log_every: 0}",
    "evaluate={tasks: [fidelity, speed], baseline: false}",
    "export.formats=[]",
]
ROUNDED = "teacher={model: teacher, quantize: {bits: 4, group_size: 32}}"
GRIDS = [Grid(bits=4, group_size=32), Grid(bits=8, group_size=32), Grid(mode="mxfp4"), Grid(mode="nvfp4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop with `rounded`, the teacher in few bits as a folder of its own."""
    root = workshop.make(tmp_path_factory.mktemp("workshop"))
    whole = models.load(str(root / "teacher"), "x")
    models.save(root / "rounded", quantized(whole, GRIDS[0]))
    return root


def work_on(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Work:
    """A run before its first stage."""
    monkeypatch.chdir(folder)
    prepared = prepare(recipe.load("recipe.yaml", [*FAST, *overrides]))
    return Work(Run(folder / "runs" / "none", Console()), prepared.recipe, prepared)


def arrays(loaded: Loaded) -> dict[str, np.ndarray]:
    found: Any = tree_flatten(loaded.model.parameters())
    return {name: np.array(array) for name, array in found}


def test_the_teacher_that_runs_is_rounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, plain, lazily = work_on(folder, monkeypatch, ROUNDED), models.load, list[bool]()

    def spy(name: str, where: str, *, lazy: bool = False, trust: bool = False) -> Loaded:
        lazily.append(lazy)
        return plain(name, where, lazy=lazy, trust=trust)

    monkeypatch.setattr(models, "load", spy)
    teacher = work.teacher()
    assert lazily == [True]
    rounded = {name for name, module in teacher.model.named_modules() if hasattr(module, "bits")}
    assert "model.embed_tokens" in rounded and "model.layers.1.mlp.down_proj" in rounded
    assert work.teacher() is teacher, "it is rounded once"
    by_hand, ours = arrays(models.load(str(folder / "rounded"), "x")), arrays(teacher)
    assert ours.keys() == by_hand.keys()
    assert all((ours[name] == by_hand[name]).all() for name in ours)
    whole = arrays(work_on(folder, monkeypatch).teacher())
    assert whole.keys() != ours.keys(), "without the option it stays as it is"


def test_targets_are_those_of_a_folder_rounded_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_on(folder, monkeypatch, ROUNDED)
    batch = make_batch(work.prepared.train)

    def targets(loaded: Loaded) -> np.ndarray:
        live = LiveTeacher(loaded, work.prepared.vocabulary)
        last = live.targets(batch).last
        assert last is not None
        return np.array(live.head.logits(last))

    mine = targets(work.teacher())
    assert (mine == targets(models.load(str(folder / "rounded"), "x"))).all()
    assert (mine != targets(models.load(str(folder / "teacher"), "x"))).any(), "the usual mistake"


def test_a_run_learns_from_it_and_measures_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of a run is that of a run whose teacher was rounded before."""
    untimed = ["teacher.model=rounded", "evaluate.tasks=[fidelity]"]
    for name, asked in {"asked": [ROUNDED], "before": untimed}.items():
        ended = command(folder, capsys, "run", "recipe.yaml", f"name={name}", *FAST, *asked)
        assert ended.code == 0, ended.err
    found = [
        json.loads((folder / "runs" / name / "evaluation.json").read_text(encoding="utf-8"))["models"]
        for name in ("asked", "before")
    ]
    for model in ("teacher", "student"):
        ours, theirs = (models_of[model] for models_of in found)
        for metric in ("nll", "kl", "parameters", "bits_per_weight"):
            assert ours.get(metric) == theirs.get(metric), (model, metric)
    size = (folder / "rounded" / "model.safetensors").stat().st_size / 2**20
    teacher = found[0]["teacher"]
    assert teacher["size_mib"] == pytest.approx(size, rel=0.1)  # without the file's header
    assert teacher["decode_tokens_per_second"] is None
    assert "rounded as it was loaded" in teacher["decode_tokens_per_second_why"]
    weights = Path("models", "student", "model.safetensors")
    runs = folder / "runs"
    assert (runs / "asked" / weights).read_bytes() == (runs / "before" / weights).read_bytes()


def test_a_cache_of_it_is_another_cache(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = "teacher={model: teacher, source: cache, top_k: 8, cache: stored}"
    rounded = stored.replace("model: teacher,", "model: teacher, quantize: {bits: 4, group_size: 32},")
    one, other = (
        work_on(folder, monkeypatch, "objective={forward_kl: }", teacher).prepared.caches["teacher"]
        for teacher in (stored, rounded)
    )
    assert {key for key in one if one[key] != other[key]} == {"teacher"}
    half = rounded.replace("bits: 4", "bits: 3")
    third = work_on(folder, monkeypatch, "objective={forward_kl: }", half).prepared.caches["teacher"]
    assert third["teacher"] not in (one["teacher"], other["teacher"])
    arguments = ["cache", "recipe.yaml", *FAST, "objective={forward_kl: }"]
    assert command(folder, capsys, *arguments, "name=whole", stored).code == 0
    ended = command(folder, capsys, *arguments, "name=rounded", rounded)
    assert ended.code == 2 and "was made with the weights of another teacher" in ended.err[0]


def test_another_grid_is_another_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = {
        work_on(folder, monkeypatch, teacher).prepared.fingerprint
        for teacher in (ROUNDED, ROUNDED.replace("4,", "8,"), "teacher={model: teacher}")
    }
    assert len(prints) == 3


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.mode}-{grid.bits}")
def test_the_estimate_counts_what_is_there(grid: Grid, folder: Path) -> None:
    given = {"quantize": {"mode": grid.mode, "bits": grid.bits, "group_size": grid.group_size}}
    small, whole = (
        models_of(recipe, {"teacher": folder / "teacher"}, 150, None).teachers["teacher"].bytes
        for recipe in (tiny_recipe(teacher=given), tiny_recipe())
    )
    made = in_few_bits(models.load(str(folder / "teacher"), "x", lazy=True), grid)
    bytes_of = sum(array.nbytes for array in arrays(made).values())
    assert small == pytest.approx(bytes_of, rel=0.05)  # norms, and the header of the file
    assert small < 0.4 * whole


def test_a_lazily_read_model_is_rounded_to_the_same_bits(folder: Path) -> None:
    lazy = in_few_bits(models.load(str(folder / "teacher"), "x", lazy=True), GRIDS[0])
    eager = quantized(models.load(str(folder / "teacher"), "x"), GRIDS[0])
    assert all((arrays(lazy)[name] == array).all() for name, array in arrays(eager).items())
    assert lazy.config["quantization"]["bits"] == 4


def test_it_is_never_there_in_full(tmp_path: Path) -> None:
    """The largest memory while it is loaded and rounded, as MLX counts it."""
    wide = Shape(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6})
    models.save(tmp_path, models.build(wide, tiny_tokenizer(), 0))
    whole = (tmp_path / "model.safetensors").stat().st_size

    def largest(lazy: bool) -> float:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        in_few_bits(models.load(str(tmp_path), "x", lazy=lazy), GRIDS[0])
        return mx.get_peak_memory() - before

    assert largest(lazy=True) < 0.5 * whole < whole < largest(lazy=False), "the second is the usual mistake"


def test_the_student_is_cut_out_of_the_whole_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = "student={prune: {sizes: {intermediate_size: 64}, tokens: 200}}"
    for name, teacher in {"of-rounded": ROUNDED, "of-whole": "teacher.model=teacher"}.items():
        ended = command(folder, capsys, "prune", "recipe.yaml", f"name={name}", *FAST, cut, teacher)
        assert ended.code == 0, ended.err
    weights = Path("models", "pruned", "model.safetensors")
    runs = folder / "runs"
    assert (runs / "of-rounded" / weights).read_bytes() == (runs / "of-whole" / weights).read_bytes()


def test_a_rounded_teacher_beside_a_whole_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = "teacher={model: teacher, others: [{model: teacher, quantize: {bits: 8, group_size: 32}}]}"
    work = work_on(folder, monkeypatch, both)
    kinds = [any("scales" in name for name in arrays(work.teacher(place))) for place in work.recipe.teachers]
    assert kinds == [False, True]
    tokens = mx.array([[1, 2, 3]])
    one, other = (work.teacher(place).model(tokens) for place in work.recipe.teachers)
    assert 0 < float(mx.abs(one - other).max()) < 0.2


WRONG = {
    "already in few bits": (
        ["teacher={model: rounded, quantize: {bits: 4, group_size: 32}}"],
        "`teacher.quantize`: rounded is quantized already (bits 4); leave it out, or name the whole model",
    ),
    "another in few bits": (
        ["teacher={model: teacher, others: [{model: rounded, quantize: {bits: 4, group_size: 32}}]}"],
        "`teacher.others.0.quantize`: rounded is quantized already",
    ),
    "the student": (
        ["teacher={model: student, quantize: {bits: 4, group_size: 32}}", "student={model: student}"],
        "`teacher.quantize`: this teacher is the student, whose weights stay whole",
    ),
    "groups that divide no layer": (
        ["teacher={model: teacher, quantize: {bits: 4, group_size: 128}}"],
        "`teacher.quantize.group_size`: 128 does not divide the 64 columns of model.embed_tokens",
    ),
    "groups of another mode": (
        ["teacher={model: teacher, quantize: {mode: mxfp4, bits: 8}}"],
        "`teacher.quantize`: mode mxfp4 has 4 bits and groups of 32; leave `bits`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_rounded_is_said_before_any_work(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, told = WRONG[case]
    before = contents(folder)
    ended = command(folder, capsys, "run", "recipe.yaml", "name=wrong", *FAST, *overrides)
    assert (ended.code, len(ended.err)) == (2, 1), ended.err
    assert told in ended.err[0], ended.err[0]
    assert contents(folder) == before


def test_nothing_is_left_for_the_folder_that_was_rounded(folder: Path, tmp_path: Path) -> None:
    """The teacher's own files are not touched."""
    copy = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", copy)
    in_few_bits(models.load(str(copy), "x", lazy=True), GRIDS[0])
    for file in (folder / "teacher").iterdir():
        assert file.read_bytes() == (copy / file.name).read_bytes()
