"""A stored teacher teaches as a live one does, whatever the order and company of its rows."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill.cache import CachedTeacher, capture, write_cache
from mlx_distill.cache.ahead import Ahead
from mlx_distill.data.batch import Batch, Batches, counted_places, make_batch, place_weights
from mlx_distill.matching import teacher_layers
from mlx_distill.teacher import Layers, LiveTeacher
from mlx_distill.train import make_objective

V = 50
ROWS = rows_of([9, 4, 13, 7, 30, 2, 1, 22])
MADE_OF = {"teacher": "0123", "chat_template": None}


@pytest.fixture(scope="module")
def live() -> LiveTeacher:
    return LiveTeacher(tiny_model(V, seed=9), V)


def stored(
    folder: Path, live: LiveTeacher, *, tail: bool = True, rows: list[Any] = ROWS, **kept: Any
) -> CachedTeacher:
    """Written and opened again; each call in a folder of its own."""
    own = folder / f"cache {len(list(folder.iterdir()))}"
    write_cache(own, live, rows, made_of=MADE_OF, **{"top_k": 8, **kept})
    return CachedTeacher(own, rows, MADE_OF, tail=tail)


def learned(
    teacher: Any, batches: list[Batch], top_k: int | None, temperature: float = 1.0, tail: bool = True
) -> Any:
    """Loss and gradients of a student, summed over batches."""
    terms = {name: {"temperature": temperature} for name in ("forward_kl", "jensen_shannon")}
    given = {"top_k": top_k, "tail": tail} if top_k else {}
    recipe = tiny_recipe(objective={**terms, "cross_entropy": {"weight": 0.5}}, teacher=given)
    return sums_of(recipe, teacher, batches)


def sums_of(recipe: Any, teacher: Any, batches: list[Batch]) -> Any:
    student = tiny_model(V).model
    objective = make_objective(student, [teacher], recipe, V)
    run: Any = nn.value_and_grad(student, objective.sums)
    total, sums = 0.0, dict[str, Any]()
    for batch in batches:
        places = counted_places(batch)
        targets = [teacher.targets(batch)]
        (loss, _), gradients = run(batch.tokens, places, place_weights(batch, places), targets, {})
        total += float(loss)
        flat: Any = tree_flatten(gradients)
        sums = {name: gradient + sums.get(name, 0) for name, gradient in flat}
    return total, sums


def batches_of(*orders: list[int], rows: list[Any] = ROWS) -> list[Batch]:
    return [make_batch([rows[i] for i in order])._replace(rows=tuple(order)) for order in orders]


EVERY = [[4, 0, 7], [2, 1], [6, 3, 5]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [V, 10 * V])
def test_all_that_is_stored_teaches_as_a_live_teacher_does(
    top_k: int, temperature: float, live: LiveTeacher, tmp_path: Path
) -> None:
    teacher = stored(tmp_path, live, top_k=top_k, temperature=temperature)
    top = teacher.targets(batches_of([0])[0]).top
    assert top is not None
    assert top.indices.shape[-1] == V
    assert top.log_tail is None
    expected = learned(live, batches_of(*EVERY), None, temperature)
    found = learned(teacher, batches_of(*EVERY), top_k, temperature)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert largest_gap(found[1], expected[1]) < 1e-4
    # Stored at another temperature it must not pass.
    other = stored(tmp_path, live, top_k=top_k, temperature=1.5 * temperature)
    wrong = learned(other, batches_of(*EVERY), top_k, temperature)
    assert largest_gap(wrong[1], expected[1]) > 1e-2


@pytest.mark.parametrize(("top_k", "loss", "gradient"), [(V, 1e-3, 5e-3), (8, 1e-3, 5e-3)])
def test_few_bits_teach_nearly_the_same(
    top_k: int, loss: float, gradient: float, live: LiveTeacher, tmp_path: Path
) -> None:
    """A sum over 88 labels, of which each is a little off, one way or the other."""
    expected = learned(live, batches_of(*EVERY), None if top_k == V else top_k)
    found = learned(stored(tmp_path, live, top_k=top_k, precision="compact"), batches_of(*EVERY), top_k)
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert largest_gap(found[1], expected[1]) < gradient
    assert found[0] != expected[0]  # they were few


@pytest.mark.parametrize("tail", [True, False])
def test_the_likeliest_that_are_stored_teach_as_those_of_a_live_teacher(
    tail: bool, live: LiveTeacher, tmp_path: Path
) -> None:
    teacher = stored(tmp_path, live, temperature=2.0, tail=tail)
    expected = learned(live, batches_of(*EVERY), 8, 2.0, tail)
    found = learned(teacher, batches_of(*EVERY), 8, 2.0, tail)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert largest_gap(found[1], expected[1]) < 1e-4
    other = learned(live, batches_of(*EVERY), 8, 2.0, not tail)
    assert largest_gap(found[1], other[1]) > 1e-3


@pytest.mark.parametrize("precision", ["exact", "compact"])
def test_outcomes_are_those_of_the_row_wherever_it_comes(
    precision: str, live: LiveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against NumPy, in the batches of two epochs: rows come in another order and company each time."""
    monkeypatch.setattr(capture, "SHARD", 20)  # several shards, and batches with rows of more than one
    monkeypatch.setattr(capture, "TOKENS", 64)
    monkeypatch.setattr(capture, "NUMBERS", 8 * V)  # logits of a batch in several pieces
    teacher = stored(tmp_path, live, precision=precision)
    assert len(teacher.store.numbers()) == 3
    batches = Batches(ROWS, 64, seed=0)
    seen: set[tuple[int, ...]] = set()
    off = 1e-6 if precision == "exact" else 0.1
    for index in range(2 * batches.per_epoch):
        batch = batches[index]
        seen.add(batch.rows)
        targets = teacher.targets(batch)
        top, count = targets.top, int(batch.counted.sum())
        assert top is not None
        assert top.log_tail is not None
        assert top.indices.shape[:2] == counted_places(batch)[None].shape
        logits = np.array(live.logits(batch.tokens), dtype=np.float64)[np.array(batch.counted)]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        indices, kept = np.array(top.indices[0])[:count], np.array(top.log_p[0])[:count]
        assert np.array_equal(np.sort(indices), np.sort(np.argsort(-log_p)[:, :8]))
        np.testing.assert_allclose(kept, np.take_along_axis(log_p, indices, axis=-1), rtol=1e-5, atol=off)
        whole = np.exp(kept.astype(np.float64)).sum(-1) + np.exp(np.array(top.log_tail[0])[:count])
        np.testing.assert_allclose(whole, 1, rtol=1e-6)  # k + 1 outcomes are all there is
        np.testing.assert_array_equal(
            np.array(targets.labels[0])[:count], np.array(batch.labels)[np.array(batch.counted)]
        )
    assert len(seen) > batches.per_epoch  # the second epoch is no copy of the first

    # Rows taken for those of another batch show.
    one, other = batches_of([4, 0, 7], [0, 4, 7])
    wrong = teacher.targets(one._replace(rows=other.rows)).top
    right = teacher.targets(one).top
    assert wrong is not None
    assert right is not None
    assert not mx.array_equal(wrong.log_p, right.log_p)


def test_rows_are_found_by_content_not_by_number(live: LiveTeacher, tmp_path: Path) -> None:
    """Another order, fewer rows, the same one twice: what was stored of each is found."""
    first = stored(tmp_path, live)
    order = [6, 2, 2, 0]
    turned = [ROWS[i]._replace(weight=3.0) for i in order]  # the weight is the student's business
    again = CachedTeacher(first.store.folder, turned, MADE_OF)
    [expected], [found] = batches_of(order), batches_of([0, 1, 2, 3], rows=turned)
    one, other = first.targets(expected).top, again.targets(found).top
    assert one is not None
    assert other is not None
    assert mx.array_equal(one.log_p, other.log_p)
    assert mx.array_equal(one.indices, other.indices)


def test_what_fills_up_is_finite(live: LiveTeacher, tmp_path: Path) -> None:
    for precision in ("exact", "compact"):
        for top_k in (1, 8, V):
            teacher = stored(tmp_path, live, top_k=top_k, precision=precision)
            top = teacher.targets(batches_of([6])[0]).top  # one counted label
            assert top is not None
            assert mx.all(mx.isfinite(top.log_p))
            assert (top.log_tail is None) == (top_k == V)
            assert mx.all((top.indices >= 0) & (top.indices < V))


def test_batches_are_read_ahead_and_are_the_same(live: LiveTeacher, tmp_path: Path) -> None:
    teacher, plain = stored(tmp_path, live), Batches(ROWS, 64, seed=0)
    read: list[tuple[int, ...]] = []
    at_once = teacher._read

    def spy(rows: Any) -> Any:
        read.append(rows)
        return at_once(rows)

    teacher._read = spy  # type: ignore[method-assign]
    ahead = Ahead(plain, [teacher, live], 4)
    for index in (0, 1, 2, 3):
        batch = ahead[index]
        assert batch.rows == plain[index].rows
        assert mx.array_equal(batch.tokens, plain[index].tokens)
        waiting = dict(teacher._expected)
        assert list(waiting)[-1:] == ([plain[index + 1].rows] if index < 3 else [plain[3].rows])
        found, expected = teacher.targets(batch).top, at_once(batch.rows)
        assert found is not None
        assert np.array_equal(np.array(found.log_p[0]), expected["log_p"])
    assert sorted(read) == sorted(plain[i].rows for i in range(4))  # each once, and none behind the last
    assert not teacher._expected
    assert ahead[1].rows == plain[1].rows  # out of order, as after a resumption


HIDDEN: dict[str, Any] = {"forward_kl": {}, "hidden_mse": {"layers": "uniform"}, "hidden_cosine": {}}


def test_stored_hidden_states_teach_as_live_ones(tmp_path: Path) -> None:
    """Wider than the student's, so that projections are made of what the cache tells of the teacher."""
    recipe = tiny_recipe(objective=HIDDEN, teacher={"source": "cache", "top_k": V})
    layers = teacher_layers(recipe.objective, 2, 4)
    assert layers == Layers({0, 2, 4}, set())
    live = LiveTeacher(tiny_model(V, seed=9, hidden_size=48, num_hidden_layers=4), V, layers)
    teacher = stored(tmp_path, live, top_k=V, hidden=layers.hidden, layers=4)
    assert (len(teacher.model.layers), teacher.model.widths) == (4, {0: 48, 2: 48, 4: 48})
    expected = sums_of(recipe, live, batches_of(*EVERY))
    found = sums_of(recipe, teacher, batches_of(*EVERY))
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert largest_gap(found[1], expected[1]) < 1e-3  # float16

    # Those of another layer must not pass.
    plain = teacher.targets

    def shifted(batch: Batch) -> Any:
        found = plain(batch)
        assert found.hidden is not None
        return found._replace(hidden={"0": found.hidden["2"], "2": found.hidden["4"], "4": found.hidden["4"]})

    teacher.targets = shifted  # type: ignore[method-assign]
    wrong = sums_of(recipe, teacher, batches_of(*EVERY))
    assert largest_gap(wrong[1], expected[1]) > 1e-2


def test_hidden_states_beyond_half_precision_keep_their_size(tmp_path: Path) -> None:
    live = LiveTeacher(tiny_model(V, seed=9), V, Layers({1}))
    plain = live.targets

    def enlarged(batch: Batch) -> Any:
        found = plain(batch)
        assert found.hidden is not None
        return found._replace(hidden={"1": 1e6 * found.hidden["1"]})

    live.targets = enlarged  # type: ignore[method-assign]
    teacher = stored(tmp_path, live, hidden=[1], layers=2)
    [batch] = batches_of([4, 0])
    found, expected = teacher.targets(batch).hidden, enlarged(batch).hidden
    assert found is not None
    count = int(batch.counted.sum())
    one, other = (np.array(states["1"])[0, :count] for states in (found, expected))
    assert np.abs(one - other).max() < 1e-3 * np.abs(other).max()
