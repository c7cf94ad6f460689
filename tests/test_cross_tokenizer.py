"""The cross-tokenizer loss against its definition, written out token by token in float64."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.data.alignment import align_rows, pack
from mlx_distill.data.batch import Encoded, at_places, make_batch
from mlx_distill.data.vocabularies import Shared, Side, shared_tokens
from mlx_distill.losses.cross_tokenizer import (
    Spans,
    cross_tokenizer,
    label_log_probability,
    sorted_distance,
    sum_over_rest,
)
from mlx_distill.losses.divergences import forward_kl
from mlx_distill.losses.targets import Targets

Array = np.ndarray

OURS: list[bytes | None] = [
    None,
    None,
    b"a",
    b"an",
    b"and",
    b"the",
    b"there",
    b"re",
    b"b",
    b"\xff",
    b" x",
    None,
]
THEIRS: list[bytes | None] = [
    b"re",
    b"then",
    b"a",
    None,
    b"b",
    b"there was",
    b"the",
    b"x",
    None,
    b"an",
    b"ant",
    b"and",
    b"\x01",
]
OUR_END, THEIR_END = 1, 3
SHARED = shared_tokens(OURS, THEIRS, OUR_END, THEIR_END)

# Ids of the first tokens, whether a rest follows on our and on their side, single.
CASES = [
    (b"the", b"the", False, False),  # one token on both sides
    (b"an", b"ant", True, False),  # ours: an|t; both count to "an"
    (b"there", b"the", False, True),  # theirs: the|re; ours has no partner
    (b"a", b"an", True, True),  # to different strings
    (b" x", b"\x01", True, True),  # to none
    (b"the", b"there was", True, True),
    (b"\xff", b"b", False, True),  # to none and to one
    (None, None, False, False),  # the ends of the turn
    (0, 8, False, False),  # two control tokens, such as other ends of a turn: one on both sides, to none
]


def id_of(token: bytes | int | None, table: list[bytes | None], end: int) -> int:
    return end if token is None else token if isinstance(token, int) else table.index(token)


def draw(seed: int = 0, scale: float = 2.0) -> dict[str, Any]:
    """Logits and spans of every case."""
    random = np.random.default_rng(seed)
    count = len(CASES)
    rest = [[-random.exponential() - 0.01 if case[side] else 0.0 for case in CASES] for side in (2, 3)]
    return {
        "student": scale * random.normal(size=(count, len(OURS))),
        "teacher": scale * random.normal(size=(count, len(THEIRS))),
        "student_rest": np.array(rest[0]),
        "teacher_rest": np.array(rest[1]),
        "ours": np.array([id_of(case[0], OURS, OUR_END) for case in CASES]),
        "theirs": np.array([id_of(case[1], THEIRS, THEIR_END) for case in CASES]),
        "single": np.array([not case[2] and not case[3] for case in CASES]),
    }


def ours_of(drawn: dict[str, Any], shared: Shared = SHARED, **options: Any) -> mx.array:
    return loss_of(drawn, shared, **options)(
        mx.array(drawn["student"][None]), mx.array(drawn["student_rest"][None])
    )


def spans_of(drawn: dict[str, Any]) -> Spans:
    ours, theirs = (mx.array(drawn[name][None].astype(np.int32)) for name in ("ours", "theirs"))
    return Spans(ours, theirs, mx.array(drawn["single"][None]))


def loss_of(drawn: dict[str, Any], shared: Shared = SHARED, **options: Any) -> Callable[..., mx.array]:
    """The loss (1, S) as a function of the student's logits and rest."""
    spans = spans_of(drawn)
    teacher, teacher_rest = mx.array(drawn["teacher"][None]), mx.array(drawn["teacher_rest"][None])

    def loss(student: mx.array, rest: mx.array) -> mx.array:
        return cross_tokenizer(student, teacher, rest, teacher_rest, spans, shared, **options)

    return loss


def reference(
    drawn: dict[str, Any],
    *,
    divergence: str = "forward_kl",
    by_beginning: bool = True,
    sorted_weight: float = 1.0,
    merge: bool = True,
    temperature: float = 1.0,
    outcomes: Callable[..., Any] | None = None,
) -> Array:
    """The definition, outcome by outcome in a dictionary."""
    values = []
    for index in range(len(drawn["student"])):
        masses = (outcomes or outcomes_of)(drawn, index, by_beginning, temperature)
        (p, p_others), (q, q_others) = masses[1], masses[0]
        value = 0.0
        for name in p.keys() | q.keys():
            one, other = p.get(name, 0.0), q.get(name, 0.0)
            middle = (one + other) / 2
            if divergence == "forward_kl" and one > 0:
                value += one * np.log(one / other)
            elif divergence == "reverse_kl" and other > 0:
                value += other * np.log(other / one)
            elif divergence == "jensen_shannon":
                value += sum(x / 2 * np.log(x / middle) for x in (one, other) if x > 0)
        size = max(len(p_others), len(q_others))
        both = [np.sort(np.pad(x, (0, size - len(x))))[::-1] for x in (p_others, q_others)]
        value = temperature**2 * value + sorted_weight * np.abs(both[0] - both[1]).sum()
        values.append(value if merge or drawn["single"][index] else 0.0)
    return np.array(values)


def outcomes_of(
    drawn: dict[str, Any], index: int, by_beginning: bool, temperature: float
) -> list[tuple[dict[Any, float], list[float]]]:
    """Masses of the outcomes, and of the single tokens in none of the strings, for student and teacher."""
    strings = (set(OURS) & set(THEIRS)) - {None}

    def counts_to(table: list[bytes | None], token: int, end: int) -> Any:
        string = table[token]
        if token == end:
            return "end"
        if string is None or (string not in strings and not by_beginning):
            return "else"
        begins = [string[:n] for n in range(len(string), 0, -1) if string[:n] in strings]
        return begins[0] if begins else "else"

    openings = [
        counts_to(OURS, int(drawn["ours"][index]), OUR_END),
        counts_to(THEIRS, int(drawn["theirs"][index]), THEIR_END),
    ]
    found = []
    for side, table, end, first in (
        ("student", OURS, OUR_END, drawn["ours"][index]),
        ("teacher", THEIRS, THEIR_END, drawn["theirs"][index]),
    ):
        logits = drawn[side][index] / temperature
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        masses: dict[Any, float] = {}
        others = []
        for token, probability in enumerate(probabilities):
            place = counts_to(table, token, end)
            if token == first and not (drawn["single"][index] and openings[0] == openings[1] != "else"):
                in_span = probability * np.exp(drawn[f"{side}_rest"][index])
                masses["span"] = in_span
                probability = probability - in_span
            if place == "else":
                others.append(probability)
            if place in openings and openings[0] != openings[1]:
                place = "else"
            masses[place] = masses.get(place, 0.0) + probability
        found.append((masses, others))
    return found


OPTIONS = [
    {},
    {"by_beginning": False},
    {"sorted_weight": 0.0},
    {"sorted_weight": 0.3, "divergence": "reverse_kl"},
    {"divergence": "jensen_shannon", "by_beginning": False},
    {"merge": False},
    {"temperature": 2.5},
    {"temperature": 0.5, "by_beginning": False, "divergence": "jensen_shannon", "merge": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_the_definition(options: dict[str, Any], seed: int) -> None:
    drawn = draw(seed)
    drawn["teacher_rest"] /= options.get("temperature", 1.0)
    expected = reference(drawn, **options)
    found = np.array(ours_of(drawn, **options)[0])
    # Relative to values of order one: a KL of 1e-3 is a difference of probabilities near 1.
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    if options.get("merge", True):
        assert (np.abs(expected) > 1e-3).all()
    else:
        assert (found[~drawn["single"]] == 0).all() and (found[drawn["single"]] != 0).all()


def test_the_usual_mistakes_have_other_values() -> None:
    drawn = draw()
    expected = reference(drawn)
    found = np.array(ours_of(drawn)[0])
    assert np.abs(found - expected).max() < 1e-5

    def renormalised(*arguments: Any) -> Any:
        """Over the shared part alone."""
        sides = []
        for masses, others in outcomes_of(*arguments):
            kept = {name: mass for name, mass in masses.items() if name != "else"}
            sides.append(({name: mass / sum(kept.values()) for name, mass in kept.items()}, others))
        return sides

    # As good as forgotten: without any, what the first token leaves to others would be nothing.
    forgotten = {**drawn, **{name: drawn[name] / 1e6 for name in ("student_rest", "teacher_rest")}}
    # The rest of the span read one place too late: another token's probability (TRL 5905).
    late = {**drawn, "student_rest": np.where(drawn["student_rest"] < 0, drawn["student_rest"] - 1.0, 0.0)}
    swapped = reference(drawn, divergence="reverse_kl")
    by_position = {**drawn, "theirs": np.roll(drawn["theirs"], 1)}
    wrong = {
        "renormalised": reference(drawn, outcomes=renormalised),
        "no rest": reference(forgotten),
        "late": reference(late),
        "swapped": swapped,
        "by position": reference(by_position),
        "no distance": reference(drawn, sorted_weight=0.0),
    }
    for name, values in wrong.items():
        assert np.abs(found - values).max() > 1e-2, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_finite_differences(options: dict[str, Any]) -> None:
    drawn = draw(5)
    loss = loss_of(drawn, **options)
    arguments = mx.array(drawn["student"][None]), mx.array(drawn["student_rest"][None])
    by_logits, by_rest = mx.grad(lambda *a: loss(*a).sum(), argnums=(0, 1))(*arguments)
    for name, found in (("student", by_logits), ("student_rest", by_rest)):
        found, expected = np.array(found[0]), np.zeros_like(drawn[name])
        for place in np.ndindex(expected.shape):
            if name == "student_rest" and drawn[name][place] == 0:
                continue  # a constant: there are no other tokens
            ends = []
            for step in (1e-6, -1e-6):
                moved = drawn[name].copy()
                moved[place] += step
                ends.append(reference({**drawn, name: moved}, **options)[place[0]])
            expected[place] = (ends[0] - ends[1]) / 2e-6
        if name == "student_rest":
            found = np.where(drawn[name] == 0, 0, found)
        assert np.abs(expected).max() > 1e-3 or (options.get("merge") is False and name == "student_rest")
        assert np.abs(found - expected).max() <= 2e-5 * max(0.1, np.abs(expected).max())


def test_no_gradient_flows_to_the_teacher() -> None:
    drawn = draw()
    spans = spans_of(drawn)

    def total(teacher: mx.array, rest: mx.array) -> mx.array:
        student = mx.array(drawn["student"][None])
        return cross_tokenizer(
            student, teacher, mx.array(drawn["student_rest"][None]), rest, spans, SHARED
        ).sum()

    arguments = mx.array(drawn["teacher"][None]), mx.array(drawn["teacher_rest"][None])
    assert all(not gradient.any() for gradient in mx.grad(total, argnums=(0, 1))(*arguments))


def whole(vocabulary: int) -> Shared:
    """One vocabulary, shared to the last token."""
    every, none = np.arange(vocabulary, dtype=np.int32), np.zeros(0, dtype=np.int32)
    side = Side(every, none, none, none, every)
    return Shared(side, side)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_one_vocabulary_it_is_the_forward_kl(temperature: float) -> None:
    random = np.random.default_rng(3)
    student, teacher = (mx.array(2 * random.normal(size=(1, 6, 40)).astype(np.float32)) for _ in range(2))
    labels = mx.array(random.integers(40, size=(1, 6)).astype(np.int32))
    zeros = mx.zeros((1, 6))
    spans = Spans(labels, labels, mx.ones((1, 6), dtype=mx.bool_))

    def ours(student: mx.array) -> mx.array:
        return cross_tokenizer(student, teacher, zeros, zeros, spans, whole(40), temperature=temperature)

    def law(student: mx.array) -> mx.array:
        return forward_kl(student, Targets(labels, teacher), temperature=temperature)

    assert mx.allclose(ours(student), law(student), rtol=1e-6, atol=1e-6)
    gradients = [mx.grad(lambda x, f=f: f(x).sum())(student) for f in (ours, law)]
    assert mx.abs(gradients[1]).max() > 1e-2
    assert mx.allclose(*gradients, rtol=1e-5, atol=1e-7)
    assert mx.abs(ours(teacher)).max() < 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_zero_where_both_sides_agree(options: dict[str, Any]) -> None:
    """One tokenizer, control tokens and all, cut differently in places: what a span lacks is equal too."""
    drawn = draw(1)
    shared = shared_tokens(OURS, OURS, OUR_END, OUR_END)
    drawn |= {"teacher": drawn["student"], "theirs": drawn["ours"], "teacher_rest": drawn["student_rest"]}
    assert np.abs(np.array(ours_of(drawn, shared, **options))).max() < 1e-6


def test_the_ids_of_a_vocabulary_do_not_matter() -> None:
    drawn = draw(2)
    order = np.random.default_rng(0).permutation(len(THEIRS))
    place = np.argsort(order)
    shared = shared_tokens(OURS, [THEIRS[i] for i in order], OUR_END, int(place[THEIR_END]))
    moved = {**drawn, "teacher": drawn["teacher"][:, order], "theirs": place[drawn["theirs"]]}
    for options in OPTIONS:
        expected = ours_of(drawn, **options)
        assert mx.allclose(ours_of(moved, shared, **options), expected, rtol=1e-5, atol=1e-6)
        # The logits moved and the pairs not.
        assert not mx.allclose(ours_of(moved, **options), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by_beginning", [True, False])
def test_the_outcomes_of_either_side_add_up_to_one(
    by_beginning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_distill.losses import cross_tokenizer as module

    seen: list[mx.array] = []

    def spy(student: mx.array, targets: Targets) -> mx.array:
        assert targets.logits is not None
        seen[:] = [student, targets.logits]
        return student.sum(-1)

    monkeypatch.setitem(module.DIVERGENCES, "forward_kl", spy)
    ours_of(draw(4), by_beginning=by_beginning)
    for logs in seen:
        assert logs.shape == (1, len(CASES), len(SHARED.ours.paired) + 2)
        assert mx.abs(mx.exp(logs).sum(-1) - 1).max() < 1e-6


def test_the_truth_is_where_it_is_lowest() -> None:
    """A text of words; the teacher has each as a token, the student spells some of them.

    The true student is what the words' probabilities make of it. With all that has no partner in one
    outcome, a student that knows the truth is told to change.
    """
    words = {b"there": 0.3, b"the": 0.2, b"then": 0.1, b"a": 0.15, b"an": 0.25}
    theirs: list[bytes | None] = [None, *words]
    ours: list[bytes | None] = [None, b"the", b"re", b"a", b"n", b"r", None]
    shared = shared_tokens(ours, theirs, 0, 0)
    tiny = 1e-9  # of what never follows
    truth = {b"the": 0.6, b"a": 0.4}
    student = np.log([[truth.get(string or b"", tiny) for string in ours]] * 3)
    teacher = np.log([[words.get(string or b"", tiny) for string in theirs]] * 3)
    drawn = {
        "student": student,
        "teacher": teacher,
        "student_rest": np.log([0.3 / 0.6, 1.0, 0.25 / 0.4]),  # the|re, the, a|n
        "teacher_rest": np.zeros(3),
        "ours": np.array([1, 1, 3]),
        "theirs": np.array([theirs.index(word) for word in (b"there", b"the", b"an")]),
        "single": np.array([False, True, False]),
    }
    assert mx.abs(ours_of(drawn, shared)).max() < 1e-5
    loss = loss_of(drawn, shared)
    gradient = mx.grad(lambda x: loss(x, mx.array(drawn["student_rest"][None])).sum())(
        mx.array(student[None])
    )
    assert mx.abs(gradient).max() < 1e-5
    assert ours_of(drawn, shared, by_beginning=False).min() > 0.3


@pytest.mark.parametrize(("one", "other"), [(5, 5), (3, 9), (9, 3), (0, 4), (4, 0), (0, 0), (1, 2000)])
def test_the_sorted_distance(one: int, other: int) -> None:
    random = np.random.default_rng(one + other)
    values = [random.random((1, 4, size)) / max(1, size) for size in (one, other)]
    padded = [
        np.sort(np.pad(v, ((0, 0), (0, 0), (0, max(one, other) - v.shape[-1]))))[..., ::-1] for v in values
    ]
    expected = np.abs(padded[0] - padded[1]).sum(-1)
    arrays = [mx.array(v.astype(np.float32)) for v in values]
    assert np.allclose(np.array(sorted_distance(*arrays)), expected, rtol=1e-5, atol=1e-7)
    if one:
        gradient = np.array(mx.grad(lambda x: sorted_distance(x, arrays[1]).sum())(arrays[0]))
        assert set(np.unique(gradient)) <= {-1.0, 0.0, 1.0} and gradient.any()


def test_it_compiles_and_runs_in_chunks_and_under_checkpoint() -> None:
    drawn = draw(6)
    arguments = mx.array(drawn["student"][None]), mx.array(drawn["student_rest"][None])
    loss = loss_of(drawn)
    expected, gradient = mx.value_and_grad(lambda *a: loss(*a).sum(), argnums=(0, 1))(*arguments)
    for function in (mx.compile(loss), mx.checkpoint(loss)):
        value, found = mx.value_and_grad(lambda *a, f=function: f(*a).sum(), argnums=(0, 1))(*arguments)
        assert mx.allclose(value, expected, rtol=1e-5)
        assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, gradient, strict=True))
    parts = []
    for start in range(0, len(CASES), 3):
        part = {name: values[start : start + 3] for name, values in drawn.items()}
        parts.append(ours_of(part))
    assert mx.allclose(mx.concatenate(parts, axis=1), loss(*arguments), rtol=1e-5, atol=1e-6)


def test_places_that_fill_up_are_finite_and_half_floats_are_taken() -> None:
    drawn = draw(7)
    filled = {**drawn, "ours": drawn["ours"] * 0 - 1, "theirs": drawn["theirs"] * 0 - 1}
    assert mx.isfinite(ours_of(filled)).all()
    logits = mx.array(drawn["student"][None]).astype(mx.bfloat16)
    rounded = {**drawn, "student": np.array(logits.astype(mx.float32))[0]}
    value = loss_of(drawn)(logits, mx.array(drawn["student_rest"][None]))
    assert value.dtype == mx.float32
    assert mx.allclose(value, ours_of(rounded), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rest", [0.0, -1e-9, -1e-7, -1e-4, -80.0, -1e4])
def test_a_span_that_is_sure_or_hopeless_has_a_finite_gradient(rest: float) -> None:
    drawn = draw(8)
    drawn["student_rest"] = np.where(drawn["single"], 0.0, rest)
    loss = loss_of(drawn)
    arguments = mx.array(drawn["student"][None]), mx.array(drawn["student_rest"][None])
    value, gradients = mx.value_and_grad(lambda *a: loss(*a).sum(), argnums=(0, 1))(*arguments)
    assert mx.isfinite(value)
    assert all(mx.isfinite(gradient).all() for gradient in gradients)


def test_the_rest_of_spans() -> None:
    random = np.random.default_rng(9)
    logits = random.normal(size=(1, 5, 7))
    labels, span = np.array([[3, 1, 6, 0, -1]]), np.array([2, 0, 2, 2, -1])
    for temperature in (1.0, 2.0):
        logs = logits / temperature - np.log(np.exp(logits / temperature).sum(-1, keepdims=True))
        expected = np.zeros(4)
        for i in range(4):
            expected[span[i]] += logs[0, i, labels[0, i]]

        def rest(logits: mx.array, temperature: float = temperature) -> mx.array:
            values = label_log_probability(logits, mx.array(labels.astype(np.int32)), temperature)
            return sum_over_rest(values, mx.array(span.astype(np.int32)), 4)

        found = rest(mx.array(logits))
        assert found.shape == (1, 4) and found[0, 1] == 0 and found[0, 3] == 0
        assert np.allclose(np.array(found[0]), expected, rtol=1e-5)
        gradient = np.array(mx.grad(lambda x, f=rest: f(x).sum())(mx.array(logits)))[0]
        chosen = np.eye(7)[labels[0]] - np.exp(logs[0])
        assert np.allclose(gradient[:4], chosen[:4] / temperature, rtol=1e-4, atol=1e-6)
        assert not gradient[4].any()


def test_what_is_packed_covers_the_text_once() -> None:
    """First tokens and rests of the spans of a batch add up to the log-likelihood of its counted tokens."""
    random = np.random.default_rng(10)
    ours = [Encoded([2, 3, 5, 7, 2, 1], 2), Encoded([8, 6, 2, 1], 1)]  # the|re|a and there|a
    theirs = [Encoded([2, 2, 2, 6, 0, 2, 3], 3), Encoded([2, 6, 0, 2, 3], 1)]
    spans = [
        align_rows(*rows, OURS, THEIRS, {OUR_END}, {THEIR_END}) for rows in zip(ours, theirs, strict=True)
    ]
    assert [[tuple(span) for span in row] for row in spans] == [
        [(2, 3, 3, 4), (3, 4, 4, 5), (4, 5, 5, 6), (5, 6, 6, 7)],
        [(1, 2, 1, 3), (2, 3, 3, 4), (3, 4, 4, 5)],
    ]
    packed = pack(spans, ours, theirs, 16, 16)
    for side, rows, vocabulary in (("our", ours, len(OURS)), ("their", theirs, len(THEIRS))):
        place, token = getattr(packed, f"{side}_first"), getattr(packed, f"{side}_tokens")
        rest, rest_token = getattr(packed, f"{side}_rest"), getattr(packed, f"{side}_rest_tokens")
        batch = make_batch(rows)
        logits = mx.array(random.normal(size=(*batch.tokens.shape, vocabulary)).astype(np.float32))
        first = label_log_probability(at_places(logits, mx.array(place)), mx.array(token[None]))
        others = label_log_probability(at_places(logits, mx.array(rest)), mx.array(rest_token[None]))
        summed = sum_over_rest(others, mx.array(getattr(packed, f"{side}_rest_span")), len(place))
        found = ((first + summed) * mx.array(packed.weight)).sum()
        labels = label_log_probability(logits, batch.labels)
        assert mx.allclose(found, mx.where(batch.counted, labels, 0).sum(-1).sum(), rtol=1e-5)
        # The usual mistake: the distribution behind the token in place of the one before it.
        late = label_log_probability(at_places(logits, mx.array(place + 1)), mx.array(token[None]))
        assert not mx.allclose(((late + summed) * mx.array(packed.weight)).sum(), found, rtol=1e-2)
