"""What makes a recipe fit: the least intrusive first, no more than it takes, and the same is learned."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE, tiny_recipe

from mlx_distill.data.batch import Encoded
from mlx_distill.fit import advice, fitted, suggested, with_options
from mlx_distill.memory import Estimate, Rows, estimate
from mlx_distill.prune.axes import shapes_of
from mlx_distill.recipe import Recipe, _apply, decode, dump

V = 32_000
SAME = ["teacher.source", "train.logits_mib", "train.batch_tokens", "train.gradient_checkpointing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and headers of a model whose weights are a hole in a file: nobody is to read them."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    folder.mkdir()
    config = {
        **SHAPE,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "vocab_size": V,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, at = dict[str, Any](), 0
    for name, shape in shapes_of({**config, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}).items():
        end = at + 4 * prod(shape)
        header[name], at = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


def recipe_of(**sections: Any) -> Recipe:
    shape = {**SHAPE, "hidden_size": 128, "num_hidden_layers": 16}
    tree: dict[str, Any] = {"student": {"shape": shape}, "data": {"max_tokens": 128}}
    return tiny_recipe(**{**tree, "train": {"batch_tokens": 4096}, **sections})


class Machine:
    """Estimates of recipes, on a machine that lends so much; training alone, which all changes are about."""

    def __init__(self, folder: Path, gib: float):
        self.folder, self.gib = folder, gib

    def __call__(self, recipe: Recipe) -> Estimate:
        found = estimate(recipe, {"teacher": self.folder, "student": self.folder}, V)
        return found._replace(machine=self.gib, stages={})


def first_keys(changes: Any) -> list[str]:
    return [next(iter(change.options)) for change in changes]


def test_suggestions_come_in_the_order_in_which_they_should_be_tried(folder: Path) -> None:
    recipe = recipe_of(teacher={"model": "embedded", "top_k": 8})
    machine = Machine(folder, 0.01)
    found = suggested(recipe, machine)
    assert first_keys(found) == [*SAME, "teacher.quantize.bits"]
    assert [one.same for one in found] == [True] * 4 + [False]
    before = machine(recipe).peak
    for one in found:  # each by itself, and as its own estimate says
        assert one.saves == pytest.approx(before - machine(one.recipe).peak) and one.saves > 0
        assert decode_again(recipe, one.overrides.split()) == one.recipe


@pytest.mark.parametrize("key", [*SAME, "teacher.quantize.bits", "student.method"])
def test_what_is_said_to_be_enough_fits_once_applied(key: str, folder: Path) -> None:
    """Of every change, on a machine that it just about suits: the words that are proposed make it fit."""
    new = {"student": {"shape": None, "model": "x"}} if key == "student.method" else {}
    recipe = recipe_of(teacher={"model": "embedded", "top_k": 8}, **new)
    machine = Machine(folder, 0.01)
    before = machine(recipe)
    saves = {next(iter(one.options)): one for one in suggested(recipe, machine)}[key].saves
    machine.gib = before.peak - 0.9 * saves
    found = suggested(recipe, machine)
    [change] = [one for one in found if next(iter(one.options)) == key]
    assert not machine(recipe).fits
    assert machine(decode_again(recipe, change.overrides.split())).fits
    line = advice(machine(recipe), [change])
    assert line is not None and change.overrides in line
    assert line.endswith("--fit applies it" if key in SAME else "GiB")


def decode_again(recipe: Recipe, overrides: list[str]) -> Recipe:
    tree = yaml.safe_load(dump(recipe))
    for override in overrides:
        _apply(tree, override)
    return decode(tree)


def test_what_changes_the_lesson_is_suggested_and_not_applied(folder: Path) -> None:
    recipe = recipe_of(student={"shape": None, "model": "x"}, train={"batch_tokens": 512})
    machine = Machine(folder, 1e-6)
    keys = {next(iter(one.options)): one.same for one in suggested(recipe, machine)}
    assert keys["teacher.source"] is False  # its whole distribution is more than what is stored of it
    assert keys["student.method"] is False
    changed, made = fitted(recipe, machine)
    assert set(first_keys(made)) <= set(SAME[1:]) and made
    assert changed.teacher == recipe.teacher and changed.student == recipe.student


def test_no_more_is_changed_than_it_takes(folder: Path) -> None:
    recipe = recipe_of(teacher={"model": "embedded", "top_k": 8})
    before = Machine(folder, 100.0)(recipe).peak
    assert fitted(recipe, Machine(folder, before)) == (recipe, [])
    counts = []
    for share in (0.99, 0.6, 0.4, 0.01):
        machine = Machine(folder, share * before)
        changed, made = fitted(recipe, machine)
        assert first_keys(made) == [key for key in SAME if key in first_keys(made)]  # in that order
        counts.append(len(made))
        if machine(changed).fits:
            without_last = made[-2].recipe if len(made) > 1 else recipe
            assert not machine(without_last).fits
    assert counts == sorted(counts) and counts[0] == 1 and counts[1] < counts[-1] == len(SAME)


def test_micro_batches_make_the_same_step(folder: Path) -> None:
    recipe = recipe_of(train={"batch_tokens": 4096, "micro_batches": 3})
    train = fitted(recipe, Machine(folder, 0.01))[0].train
    assert train.batch_tokens * train.micro_batches == 4096 * 3
    assert train.batch_tokens >= 128  # a row still fits


@pytest.mark.parametrize("stage", ["generate", "evaluate"])
def test_fewer_answers_are_written_at_once_where_they_take_most(stage: str, folder: Path) -> None:
    asked = Encoded([3] * 100, 50)
    known = Rows(questions=[100] * 500) if stage == "generate" else Rows([asked], test=[asked] * 500)
    recipe = recipe_of(
        train={"batch_tokens": 128},
        generate={"batch_size": 400},
        evaluate={"tasks": ["exact"], "batch_size": 400},
    )

    def machine(changed: Recipe) -> Estimate:
        found = estimate(changed, {"teacher": folder}, V, rows=known)
        kept = {name: parts for name, parts in found.stages.items() if name == stage}
        return found._replace(machine=lends, stages=kept)

    lends = 0.0
    whole = machine(recipe)
    assert whole.at == stage
    lends = 0.5 * (whole.peak + whole.together)
    changed, [made] = fitted(recipe, machine)
    assert machine(changed).fits and [*made.options] == [f"{stage}.batch_size"]
    size = getattr(changed, stage).batch_size
    assert 1 < size < 400  # no fewer than it takes
    twice = with_options(changed, {f"{stage}.batch_size": 2 * size})
    assert twice is not None and not machine(twice).fits


def test_one_line_names_the_change_that_helps(folder: Path) -> None:
    recipe = recipe_of()
    before = Machine(folder, 100.0)(recipe)
    assert advice(before, []) is None
    machine = Machine(folder, 0.95 * before.peak)
    found = machine(recipe)
    line = advice(found, suggested(recipe, machine))
    assert line is not None and "\n" not in line
    assert line.startswith(f"memory: train takes an estimated {found.peak:.2g} GiB")
    assert "train.logits_mib=" in line and line.endswith("--fit applies it")
    assert "smaller models" in str(advice(found, []))


def test_options_that_contradict_the_rest_are_no_change() -> None:
    recipe = tiny_recipe(generate={"on_policy": {}}, objective={"forward_kl": {}})
    assert with_options(recipe, {"teacher.source": "cache", "teacher.top_k": 8}) is None
    assert with_options(recipe, {"train.logits_mib": 8}) is not None
    assert with_options(recipe, {}) == recipe
