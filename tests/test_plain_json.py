"""JSON that others wrote: what is read of it can be written again."""

import pytest

from mlx_distill.plain_json import parse_object


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400])
def test_numbers_that_no_float_holds_are_refused_where_asked(number: str) -> None:
    text = f'{{"a": [{number}]}}'
    assert "a" in parse_object(text)  # as in the config of a Mamba
    with pytest.raises(ValueError, match="is no finite number"):
        parse_object(text, finite=True)


def test_other_numbers_are_what_they_were() -> None:
    found = parse_object('{"a": [1.5, -2, 0, 1e-5]}', finite=True)["a"]
    assert found == [1.5, -2, 0, 1e-5] and [type(one) for one in found] == [float, int, int, float]
