"""A teacher with a tokenizer of its own, from aligned rows to a finished run."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import workshop
from mlx.utils import tree_flatten, tree_map
from tiny import SHAPE, largest_gap, tiny_recipe
from workshop import command

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.batch import Batch, Encoded, counted_places, make_batch, place_weights
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode
from mlx_distill.losses.cross_tokenizer import Spans, cross_tokenizer
from mlx_distill.objective import Objective
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import NewTokenizer, Shape
from mlx_distill.recipe import Recipe
from mlx_distill.spans import ForeignTeacher
from mlx_distill.teacher import LiveTeacher
from mlx_distill.tokenizer import train_tokenizer
from mlx_distill.train import make_objective, make_step

POCKET = pocket.rows("code", "train", 60)
TEXTS = [f"{row.prompt}{row.completion}" for row in POCKET]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0},
    {"divergence": "jensen_shannon", "sorted_weight": 0.0},
    {"merge": False, "by_beginning": False, "temperature": 0.5},
]


class Side:
    """A tokenizer, a model over it, and rows in its tokens."""

    def __init__(self, pieces: int, seed: int, **shape: Any):
        self.tokenizer: Any = train_tokenizer(TEXTS, NewTokenizer(pieces=pieces, byte_fallback=False))
        self.size = max(self.tokenizer.get_vocab().values()) + 1
        self.rows: list[Encoded] = [encode(row, self.tokenizer, count="completion") for row in POCKET[:6]]
        self.loaded = models.build(Shape(**{**SHAPE, **shape}), self.tokenizer, seed)
        # Far enough from uniform for mistakes to show.
        self.loaded.model.update(tree_map(lambda a: 1.5 * a, self.loaded.model.parameters()))
        self.model: Any = self.loaded.model


class Lesson:
    def __init__(self, teacher: dict[str, Any] | None = None, own_seed: int | None = None, **objective: Any):
        self.ours, self.theirs = Side(90, 0), Side(140, 9, hidden_size=48)
        given = {"weight": 1.0, **(teacher or {})}
        self.recipe: Recipe = tiny_recipe(objective=objective, teacher=given)
        ours, theirs = self.ours, self.theirs
        self.foreign = ForeignTeacher(
            theirs.loaded, theirs.size, ours.rows, theirs.rows, ours.tokenizer, ours.size
        )
        self.teachers: list[Any] = [self.foreign]
        if own_seed is not None:
            own = models.build(Shape(**SHAPE), ours.tokenizer, own_seed)
            self.teachers.append(LiveTeacher(own, ours.size))
        self.objective: Objective = make_objective(ours.model, self.teachers, self.recipe, ours.size)
        self.objective.chunk = 16

    def batch(self, *rows: int, **how: Any) -> Batch:
        return make_batch([self.ours.rows[i] for i in rows], **how)._replace(rows=rows)

    def found(self, batch: Batch) -> tuple[float, dict[str, mx.array]]:
        targets = [teacher.targets(batch) for teacher in self.teachers]
        run: Any = nn.value_and_grad(self.ours.model, self.objective.sums)
        (total, self.parts), gradients = run(
            batch.tokens, counted_places(batch), place_weights(batch, counted_places(batch)), targets, {}
        )
        return float(total), dict(tree_flatten(gradients))

    def definition(self, batch: Batch, **options: Any) -> mx.array:
        """Every span of the batch at once, from all logits of both sides."""
        temperature = options.get("temperature", 1.0)
        read = make_batch([self.theirs.rows[i] for i in batch.rows])
        logits = (
            self.ours.model(batch.tokens)[..., : self.ours.size],
            mx.stop_gradient(self.theirs.model(read.tokens)[..., : self.theirs.size]),
        )
        first: tuple[list[mx.array], list[mx.array]] = ([], [])
        rest: tuple[list[mx.array], list[mx.array]] = ([], [])
        tokens: tuple[list[int], list[int]] = ([], [])
        single = []
        for place, index in enumerate(batch.rows):
            rows = (self.ours.rows[index].tokens, self.theirs.rows[index].tokens)
            for span in self.foreign.spans[index]:
                single.append(span.single)
                for side, (start, end) in enumerate([span[:2], span[2:]]):
                    logs = logits[side][place] / temperature
                    logs = logs - mx.logsumexp(logs, axis=-1, keepdims=True)
                    first[side].append(logits[side][place, start - 1])
                    tokens[side].append(rows[side][start])
                    more = [logs[i - 1, rows[side][i]] for i in range(start + 1, end)]
                    rest[side].append(sum(more, mx.array(0.0)))
        (s_first, t_first), (s_rest, t_rest) = ([mx.stack(x)[None] for x in both] for both in (first, rest))
        spans = Spans(mx.array([tokens[0]]), mx.array([tokens[1]]), mx.array([single]))
        return cross_tokenizer(s_first, t_first, s_rest, t_rest, spans, self.foreign.shared, **options).sum()

    def expected(self, batch: Batch, **options: Any) -> tuple[float, dict[str, mx.array]]:
        run: Any = nn.value_and_grad(self.ours.model, lambda: self.definition(batch, **options))
        total, gradients = run()
        return float(total), dict(tree_flatten(gradients))


def same(found: Any, expected: Any) -> bool:
    return bool(np.isclose(found[0], expected[0], rtol=1e-5) and largest_gap(found[1], expected[1]) < 5e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_sum_in_chunks_is_the_definition(options: dict[str, Any]) -> None:
    lesson = Lesson(cross_tokenizer=options)
    batch = lesson.batch(3, 0, 5)
    spans = [span for i in batch.rows for span in lesson.foreign.spans[i]]
    several = [span for span in spans if not span.single]
    assert len(spans) > 3 * lesson.objective.chunk  # several chunks, and the last one not full
    assert len(several) > lesson.objective.chunk
    expected = lesson.expected(batch, **options)
    for chunk in (16, 100, 10_000):
        lesson.objective.chunk = chunk
        assert same(lesson.found(batch), expected)
        assert float(lesson.parts["cross_tokenizer"]) == pytest.approx(expected[0], rel=1e-5)

    # The usual mistake, rows of one side laid beside others of the other, must not pass.
    shifted = batch._replace(rows=(0, 3, 5))
    assert not same(lesson.found(shifted), expected)


def test_a_weight_scales_the_loss_and_its_gradient_and_not_what_is_logged() -> None:
    """Applied behind the chunks, which form the gradient themselves, it would be lost or make it NaN."""
    plain, weighed = Lesson(cross_tokenizer={}), Lesson(cross_tokenizer={"weight": 0.5})
    batch = plain.batch(3, 0, 5)
    total, gradients = plain.found(batch)
    half = total / 2, {name: gradient / 2 for name, gradient in gradients.items()}
    assert same(weighed.found(batch), half)
    assert not same(weighed.found(batch), (total / 2, gradients))
    assert float(weighed.parts["cross_tokenizer"]) == pytest.approx(total, rel=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    lesson = Lesson(cross_tokenizer={})
    batch = lesson.batch(1, 2)
    model, (_, gradients) = lesson.ours.model, lesson.found(batch)
    weights = dict(tree_flatten(model.parameters()))
    random = np.random.default_rng(0)
    # Along the gradient and a bit aside, so that the slope is not lost in rounding.
    norm = float(mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.array(0.0))))
    direction = {
        name: g / norm + mx.array(0.01 * random.normal(size=g.shape).astype(np.float32))
        for name, g in gradients.items()
    }
    slope = float(sum(((gradients[name] * direction[name]).sum() for name in direction), mx.array(0.0)))
    step, values = 2e-3, []
    for sign in (1, -1):
        model.load_weights([(name, weights[name] + sign * step * direction[name]) for name in weights])
        values.append(lesson.found(batch)[0])
    model.load_weights(list(weights.items()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)
    assert slope > 1


def test_the_teacher_gets_no_gradient() -> None:
    lesson = Lesson(cross_tokenizer={})
    batch = lesson.batch(1, 2)
    lesson.theirs.model.unfreeze()

    def taught(stopped: bool) -> mx.array:
        if not stopped:
            return lesson.theirs.model(batch.tokens % lesson.theirs.size).sum()
        targets = [lesson.foreign.targets(batch)]
        return lesson.objective.sums(
            batch.tokens, counted_places(batch), place_weights(batch, counted_places(batch)), targets, {}
        )[0]

    run: Any = nn.value_and_grad(lesson.theirs.model, taught)
    gradients: Any = tree_flatten(run(True)[1])
    assert not any(mx.any(gradient).item() for _, gradient in gradients)
    others: Any = tree_flatten(run(False)[1])
    assert any(mx.any(gradient).item() for _, gradient in others)  # without the stop there would be one


def test_padding_order_and_micro_batches_leave_the_sum_alone() -> None:
    lesson = Lesson(cross_tokenizer={}, cross_entropy={"weight": 0.3})
    expected = lesson.found(lesson.batch(0, 1, 2, 3))
    assert same(lesson.found(lesson.batch(0, 1, 2, 3, pad_to=96)), expected)
    assert same(lesson.found(lesson.batch(3, 1, 0, 2)), expected)
    one, other = lesson.found(lesson.batch(0, 1)), lesson.found(lesson.batch(2, 3))
    both = one[0] + other[0], {name: one[1][name] + other[1][name] for name in one[1]}
    assert same(both, expected)
    assert not same(one, expected)


def test_a_compiled_step_gives_the_same() -> None:
    lesson = Lesson(cross_tokenizer={}, cross_entropy={"weight": 0.3})
    optimizer = make_optimizer(lesson.recipe.train)
    optimizer.init(lesson.ours.model.trainable_parameters())
    step = make_step(lesson.objective, optimizer, lesson.recipe)
    for rows in ((0, 1), (4, 2)):  # through one trace, if their shapes allow
        batch = lesson.batch(*rows)
        expected = lesson.found(batch)[1]
        sums, _ = step.gradients(batch, [lesson.foreign.targets(batch)], {})
        assert largest_gap(dict(tree_flatten(sums)), expected) < 5e-5


def test_beside_a_teacher_of_its_own_each_counts_with_its_share() -> None:
    losses: dict[str, Any] = {"cross_tokenizer": {"weight": 0.7}, "forward_kl": {}}
    lesson = Lesson({"weight": 1.0, "others": [{"model": "x", "weight": 3.0}]}, 5, **losses)
    batch = lesson.batch(2, 4)
    total, _ = lesson.found(batch)
    alone = Lesson(cross_tokenizer={})
    spans, _ = alone.found(batch)
    assert float(lesson.parts["cross_tokenizer"]) == pytest.approx(0.25 * spans, rel=1e-5)
    logits = [model(batch.tokens) for model in (lesson.teachers[1].model, lesson.ours.model)]
    log_p, log_q = (one - mx.logsumexp(one, axis=-1, keepdims=True) for one in logits)
    kl = float(mx.where(batch.counted, (mx.exp(log_p) * (log_p - log_q)).sum(-1), 0).sum())
    assert float(lesson.parts["forward_kl"]) == pytest.approx(0.75 * kl, rel=1e-4)
    assert total == pytest.approx(0.7 * 0.25 * spans + 0.75 * kl, rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


ACROSS = ["recipe.yaml", "objective={cross_entropy: {}, cross_tokenizer: {}}", "evaluate.tasks=[fidelity]"]
NEW = "student.tokenizer={pieces: 50, byte_fallback: false}"


def evaluation(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "evaluation.json").read_text(encoding="utf-8"))["models"]


def check_evaluation(found: dict[str, Any]) -> None:
    assert list(found) == ["teacher", "student_before", "baseline", "student"]
    for name, values in found.items():
        assert values["bits_per_byte"] > 0, name
        if name == "teacher":
            assert "kl" not in values
        else:
            assert values["kl"] is None
            assert values["kl_why"] == "the teacher's tokens are others than the student's"
            assert "top1_agreement" not in values  # nothing to agree with, token by token


def test_a_new_student_with_a_tokenizer_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns from the labels, and from what a teacher with other tokens answers to prompts."""
    learn = ["name=taught", "teacher=null", "objective={cross_entropy: }", "student={model: teacher}"]
    by_heart = ["train={steps: 80, batch_tokens: 512, learning_rate: 1e-2}", "evaluate.tasks=[]"]
    assert command(folder, capsys, "train", "recipe.yaml", *learn, *by_heart).code == 0
    more = [
        NEW,
        "name=new",
        "teacher.model=runs/taught/models/student",
        "data={train: {source: good.jsonl, rows: 8}, prompts: {source: good.jsonl, start: 4}, "
        "valid: good.jsonl, test: good.jsonl, max_tokens: 128}",
        "generate.max_tokens=30",
        "train={steps: 16, batch_tokens: 512, learning_rate: 1e-2, log_every: 1, eval_every: 16}",
    ]
    assert command(folder, capsys, "run", *ACROSS, *more).code == 0
    run = folder / "runs" / "new"
    found = evaluation(folder, "new")
    check_evaluation(found)
    assert found["student"]["bits_per_byte"] < 0.5 * found["student_before"]["bits_per_byte"]
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    assert stages["generate"]["kept"] > 0
    assert stages["train"]["rows"] == 8 + stages["generate"]["kept"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    learned = [line["cross_tokenizer"] for line in lines if "cross_tokenizer" in line]
    assert len(learned) == 16
    assert learned[-1] < 0.5 * learned[0]
    watched = [line for line in lines if "valid_nll" in line]
    assert watched
    assert all("valid_kl" not in line for line in watched)
    tokenizer = models.load_tokenizer(run / "models" / "student")
    assert len(tokenizer.get_vocab()) < len(models.load_tokenizer(folder / "teacher").get_vocab())


def test_a_loaded_student_keeps_its_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["name=loaded", "teacher.model=stranger", "student={model: student}", "train.steps=2"]
    assert command(folder, capsys, "run", *ACROSS, *more).code == 0
    check_evaluation(evaluation(folder, "loaded"))
    tokenizers = [
        models.load_tokenizer(path).get_vocab()
        for path in (folder / "student", folder / "runs/loaded/models/student", folder / "stranger")
    ]
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]


def test_what_one_side_cannot_write_is_in_no_span() -> None:
    """Behind a character that a tokenizer does not know nobody can tell where the two are."""
    ours, theirs = Side(90, 0), Side(140, 9)
    row = Row(prompt="def f(x):", completion=" return \u00df + x")
    rows = [[encode(row, side.tokenizer, count="completion")] for side in (ours, theirs)]
    foreign = ForeignTeacher(theirs.loaded, theirs.size, rows[0], rows[1], ours.tokenizer, ours.size)
    [spans] = foreign.spans
    covered = ours.tokenizer.decode(rows[0][0].tokens[spans[0].our_start : spans[-1].our_start])
    assert covered.strip() == "+ x"


def changed(folder: Path, name: str, part: str, value: dict[str, Any]) -> None:
    """A copy of `stranger` whose tokenizer has this part in place of, or before, its own."""
    shutil.copytree(folder / "stranger", folder / name)
    file = folder / name / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    both = {"type": "Sequence", "normalizers": [value, tree["normalizer"]]}
    file.write_text(json.dumps({**tree, part: both if part == "normalizer" else value}), encoding="utf-8")


def test_a_row_that_reads_differently_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(folder, "lower", "normalizer", {"type": "Lowercase"})
    texts = [" return x", " return True"]
    rows = [{"prompt": "def f(x):", "completion": text} for text in texts]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = ["name=lower", "data.train=letters.jsonl", "student={model: student}"]
    ended = command(folder, capsys, "train", *ACROSS, *more, "teacher.model=lower")
    assert (ended.code, len(ended.err)) == (2, 1)
    assert "`objective.cross_tokenizer`: letters.jsonl:2 reads differently" in ended.err[0]
    assert "ours goes on with b'True', theirs with b'true'" in ended.err[0]


def test_a_tokenizer_whose_bytes_are_not_known_is_refused_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("weights were read"))
    changed(folder, "pieces", "decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True})
    more = ["name=pieces", "student={model: student}", "teacher.model=pieces"]
    ended = command(folder, capsys, "train", *ACROSS, *more)
    assert (ended.code, len(ended.err)) == (2, 1)
    assert "`objective.cross_tokenizer`: `teacher.model`: the bytes of the tokens of " in ended.err[0]
    assert not (folder / "runs" / "pieces").exists()
