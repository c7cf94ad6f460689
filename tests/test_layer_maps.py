"""Layer maps against tables made by hand, and what they refuse."""

from itertools import pairwise

import pytest
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlx_distill.losses.layer_maps import Layers, layer_pairs

ADAPTER = TypeAdapter(Layers, config=ConfigDict(strict=True, allow_inf_nan=False))


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("last", 4, 12, [(4, 12)]),
        ("last", 6, 6, [(6, 6)]),
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),  # 1.5 and 4.5 up, not to the even neighbour
        ("uniform", 5, 12, [(1, 2), (2, 5), (3, 7), (4, 10), (5, 12)]),  # 2.4, 4.8, 7.2, 9.6
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 1, 7, [(1, 7)]),
        ("uniform", 6, 2, [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]),  # never layer 0
        ("every_other", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("every_other", 3, 7, [(1, 3), (2, 5), (3, 7)]),
        ("every_other", 4, 7, [(1, 1), (2, 3), (3, 5), (4, 7)]),
        ("all", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ([[2, 7], [4, 12]], 4, 12, [(2, 7), (4, 12)]),
        ([[4, 12], [4, 11]], 4, 12, [(4, 12), (4, 11)]),
    ],
)
def test_pairs_are_those_of_the_table(layers, student, teacher, pairs):
    assert layer_pairs(layers, student, teacher) == pairs
    if layers not in ("last",) and isinstance(layers, str):
        assert layer_pairs(layers, student, teacher, embeddings=True) == [(0, 0), *pairs]
    else:
        assert layer_pairs(layers, student, teacher, embeddings=True) == pairs


@pytest.mark.parametrize("student", [1, 2, 5, 8, 13])
def test_uniform_reaches_from_first_to_last_in_order(student):
    for teacher in range(1, 40):
        pairs = layer_pairs("uniform", student, teacher)
        assert [ours for ours, _ in pairs] == list(range(1, student + 1))
        theirs = [number for _, number in pairs]
        assert theirs == sorted(theirs)
        assert theirs[0] >= 1
        assert theirs[-1] == teacher
        assert all(abs(number - i * teacher / student) <= 0.5 or number == 1 for i, number in pairs)


def test_uniform_is_tinyberts_map_where_depths_divide():
    """It numbers layers from 0: student layer i attends like teacher layer i * k + k - 1, and its hidden
    state, embeddings first, is i * k."""
    student, k = 4, 3
    attention = [(i + 1, i * k + k - 1 + 1) for i in range(student)]
    assert layer_pairs("uniform", student, student * k) == attention
    hidden = [(i, i * k) for i in range(student + 1)]
    assert layer_pairs("uniform", student, student * k, embeddings=True) == hidden
    # The usual mistake takes the index of one for the other.
    assert [(i + 1, i * k + 1) for i in range(student)] != attention


def test_half_as_deep_means_that_uniform_and_every_other_agree():
    for student in range(1, 20):
        for teacher in (2 * student - 1, 2 * student, 2 * student + 1):
            pairs = layer_pairs("every_other", student, teacher)
            assert pairs[-1] == (student, teacher)
            assert all(b[1] - a[1] == 2 for a, b in pairwise(pairs))
        assert layer_pairs("every_other", student, 2 * student) == layer_pairs(
            "uniform", student, 2 * student
        )


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        (
            [[3, 40]],
            4,
            28,
            r"layers \[3, 40\]: the student's layers are 1 to 4 and the teacher's 1 to 28; choose",
        ),
        ([[1, 1], [5, 2]], 4, 28, r"layers \[5, 2\]: the student's layers are 1 to 4"),
        ([[0, 0]], 4, 28, r"layers \[0, 0\]: the student's layers are 1 to 4"),
        ([[2, 4], [1, 2], [2, 4]], 4, 28, r"layers \[2, 4\] stands twice"),
        (
            "every_other",
            4,
            12,
            "every_other: the student has 4 layers and the teacher 12 l.*use uniform",
        ),
        ("every_other", 12, 4, "use uniform"),
        ("all", 1, 12, "all: the student has 1 layer and the teacher 12 layers, not as many; use uniform"),
    ],
)
def test_maps_that_the_models_do_not_allow_are_refused_in_a_line(layers, student, teacher, message):
    with pytest.raises(ValueError, match=message) as error:
        layer_pairs(layers, student, teacher)
    assert "\n" not in str(error.value)


def test_layer_0_is_for_hidden_states_alone():
    assert layer_pairs([[0, 0], [2, 4]], 4, 8, embeddings=True) == [(0, 0), (2, 4)]
    with pytest.raises(ValueError, match="the student's layers are 0 to 4"):
        layer_pairs([[5, 0]], 4, 8, embeddings=True)


@pytest.mark.parametrize("value", ["last", "uniform", "every_other", "all", [[2, 4]], [[0, 0], [4, 8]]])
def test_a_recipe_may_say(value):
    assert ADAPTER.validate_python(value) == value


@pytest.mark.parametrize(
    "value",
    [
        *("every-other", "", [], [2, 4], [[2]], [[2, 4, 6]], [[2, 4.0]], [["2", 4]], [[True, 1]]),
        *([[-1, 2]], 3, None, {"last": 1}, [[1, 1], "last"]),
    ],
)
def test_a_recipe_may_not_say_and_hears_one_mistake(value):
    with pytest.raises(ValidationError, match="last, uniform, every_other, all, or a list of") as error:
        ADAPTER.validate_python(value)
    assert len(error.value.errors()) == 1
    assert error.value.errors()[0]["input"] == value
