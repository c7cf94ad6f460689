"""Recipes that on-policy rows, the policy gradient or a student as its own teacher do not allow."""

from typing import Any

import pytest
from tiny import tiny_recipe

from mlx_distill.errors import RecipeError
from mlx_distill.recipe import fingerprint

LIVE = {"objective": {"reverse_kl": {}}, "generate": {"on_policy": {}}}
PG = {"objective": {"policy_gradient": {}}}
MODEL = {"model": "x", "shape": None}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": (
        {
            **LIVE,
            "teacher": None,
            "student": {"tokenizer": {"pieces": 40}},
            "objective": {"cross_entropy": {}},
        },
        "no one judges what the student writes; name a `teacher`",
    ),
    "stored targets": (
        {**LIVE, "teacher": {"source": "cache", "top_k": 4}},
        "`teacher.source` cache cannot hold what is said of them; use live",
    ),
    "maybe stored": (
        {**LIVE, "teacher": {"source": "auto", "top_k": 4}},
        "`teacher.source` auto cannot hold",
    ),
    "other tokenizers": (
        {**LIVE, "objective": {"cross_tokenizer": {}}, "student": MODEL},
        "`objective.cross_tokenizer` aligns the rows of the data alone",
    ),
    "nobody asked": (
        {**LIVE, "objective": {"cross_entropy": {}}, "generate": {"on_policy": {"share": 0.5}}},
        "no loss of `objective` asks the teacher",
    ),
    "labels without rows": (
        {**LIVE, "objective": {"reverse_kl": {}, "cross_entropy": {}}},
        "`objective.cross_entropy` takes labels for right",
    ),
    "adaptive without validation": (
        {**LIVE, "generate": {"on_policy": {"schedule": "adaptive"}}},
        "schedule adaptive follows the validation loss; set `train.eval_every`",
    ),
    "policy gradient off policy": (PG, "judges tokens that the student wrote; set `generate.on_policy`"),
    "policy gradient half on policy": (
        {**PG, "generate": {"on_policy": {"share": 0.5}}},
        "set `generate.on_policy.share` to 1.0, not 0.5",
    ),
    "policy gradient on old rows": (
        {**PG, "generate": {"on_policy": {"buffer": 9}}},
        "set `generate.on_policy.buffer` to 0, not 9",
    ),
    "policy gradient tempered": (
        {**PG, "generate": {"on_policy": {"temperature": 0.9}}},
        "set `generate.on_policy.temperature` to 1.0, not 0.9",
    ),
    "policy gradient cut": (
        {**PG, "generate": {"on_policy": {"top_k": 9}}},
        "set `generate.on_policy.top_k` to null, not 9",
    ),
    "policy gradient adaptive": (
        {**PG, "generate": {"on_policy": {"schedule": "adaptive"}}, "train": {"eval_every": 2}},
        "set `generate.on_policy.schedule` to constant, not adaptive",
    ),
    "policy gradient of a top k": (
        {**PG, "generate": {"on_policy": {}}, "teacher": {"top_k": 4}},
        "need not be among `teacher.top_k`; leave it out",
    ),
    "policy gradient with dropout": (
        {**PG, "generate": {"on_policy": {}}, "student": {**MODEL, "method": "lora", "dropout": 0.1}},
        "with `student.dropout` another student writes",
    ),
    "a new student as teacher": (
        {"teacher": {"model": "student"}, "student": {"tokenizer": {"pieces": 40}}},
        "a new `student.shape` knows nothing then; load a `student.model`, or set `ema`",
    ),
    "a new student without a tokenizer": (
        {"teacher": {"model": "student", "ema": 0.9}},
        "a new `student.shape` has no tokenizer; add `student.tokenizer`",
    ),
}


@pytest.mark.parametrize(("sections", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_says_what_to_change(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(**sections)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "sections",
    [
        LIVE,
        {**PG, "generate": {"on_policy": {}}},
        {**LIVE, "objective": {"hidden_cosine": {}, "attention_relations": {}, "forward_kl": {}}},
        {"teacher": {"model": "student"}, "student": MODEL},
        {"teacher": {"model": "student", "ema": 0.9}, "student": {"tokenizer": {"pieces": 40}}},
        {"teacher": {"model": "embedded", "others": [{"model": "student"}]}, "student": MODEL},
    ],
)
def test_a_right_one_passes(sections: dict[str, Any]) -> None:
    tiny_recipe(**sections)


def test_what_adaptive_heeds_determines_the_student() -> None:
    """Validation only watches other runs, so it may change when they go on; here it decides."""
    adaptive = {"schedule": "adaptive"}
    for options, heeded in ((adaptive, True), ({}, False)):
        one, other = (
            tiny_recipe(
                **{**LIVE, "generate": {"on_policy": options}},
                train={"eval_every": every},
                data={"valid": {"source": "pocket", "rows": 3}},
            )
            for every in (2, 3)
        )
        assert (fingerprint(one) != fingerprint(other)) == heeded
