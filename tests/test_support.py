"""The table of model types says what is so.

`python tests/test_support.py` measures every model type of mlx-lm anew, which takes some minutes, and
writes mlx_distill/models/support.json and docs/models.md.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING
from tiny_configs import model_types, tiny_of

from mlx_distill.errors import ModelError
from mlx_distill.models.early_exit import Stack, final_norm
from mlx_distill.models.head import Head
from mlx_distill.models.support import (
    FILE,
    Support,
    read_support,
    refuse_attention,
    refuse_exits,
    refuse_hidden,
    support,
)
from mlx_distill.models.taps import Attention, attention_probabilities, tapped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7], [9, 8, 3, 1, 7, 2, 5]])
VARIED = ["gemma2", "gemma3_text", "llama", "mamba", "phi3", "qwen2", "qwen3", "qwen3_moe"]
MARKS = {
    True: "yes",
    False: "no",
    "all": "yes",
    "some": "some layers",
    "none": "no",
    "exact": "yes",
    "whole": "no",
}
INTRODUCTION = """\
# What works for which model type

Made by `python tests/test_support.py`, which builds a tiny model of every model type in mlx-lm {version} and
measures; tests compare this page with the code. The model type stands in a model's config.json as
`model_type`. Losses on the logits alone work for all of them, but a type whose notes say `training` can teach
and not learn.

- **hidden states** ({hidden} of {tried} tried): the output of each layer can be matched (`hidden_mse`,
  `hidden_cosine`), the output of the model stays as it was to the bit, and gradients are finite.
- **attention** (all layers: {attention}, some: {some}): queries, keys and values can be watched, so that
  probabilities times values are what the model computes. Of a layer that attends twice, as longcat_flash's
  do, it is the last time.
- **chunks** ({head}): the last projection can be split off, so that a loss over a big vocabulary takes the
  memory of a chunk of positions. Where it cannot, memory is that of all logits at once.
- **exits** ({exits}): norm and head give the model's own logits from its last layer, so that they can be put
  behind earlier layers in training.
- **early answers** ({early}): decoding can leave at an earlier layer, and check itself with the whole model.

A recipe that needs what does not work is refused by name. There are {all_types} types in all; those with `?`
could not be tried on the machine that made this page, and are allowed. One small shape of each was measured:
which layers of a hybrid show attention follows its own config, and a type whose sliding windows are off in
your config may do more than stands here.

| model type | hidden states | attention | chunks | exits | early answers | notes |
|---|---|---|---|---|---|---|"""
REASONS = {  # why a type cannot be built or run on the machine that measures
    "No Metal back-end": "it has kernels for Metal alone",
    "SystemExit": "it needs a package that is not installed",
    "Hadamard pack": "it needs weights packed in its own way",
}


def measure(model_type: str) -> dict[str, Any]:
    """What a tiny model of this type shows, as it stands in support.json."""
    try:
        model: Any = tiny_of(model_type)
        plain = model(TOKENS)
        mx.eval(plain)
    except (Exception, SystemExit) as error:  # architectures raise whatever they raise
        text = f"{type(error).__name__}: {error}"
        return {"not_tried": next((reason for part, reason in REASONS.items() if part in text), text)}
    model.train()  # some take kernels without a gradient otherwise
    why: dict[str, str] = {}
    trains = _works("training", why, _check_gradient, model, lambda: model(TOKENS)[..., :8].square().mean())
    hidden = _works("hidden", why, _hidden, model, plain, trains)
    attention = _attention(model, trains, why)
    found = {
        "hidden": hidden,
        "attention": attention,
        "head": "whole" if Head(model, plain.shape[-1]).whole else "exact",
        "exits": _works("exits", why, _exits, model, plain),
        "early_answers": _works("early_answers", why, lambda: Stack(model)),
    }
    if why.get("exits") == why.get("early_answers"):
        why.pop("early_answers", None)
    return found | ({"why": why} if why else {})


def _works(what: str, why: dict[str, str], check: Any, *arguments: Any) -> bool:
    """Whether a check finds no ModelError; its reason is noted."""
    try:
        check(*arguments)
    except ModelError as error:
        text = str(error).partition("; ")[0]
        inside = re.fullmatch(r"model type .*? hides .*? \((.*)\)", text)
        text = inside[1] if inside else text.rpartition("': ")[2]
        why[what] = re.sub(r" \(.*\)?$", "", text) if "another way" in text else text
        return False
    return True


def _hidden(model: Any, plain: mx.array, trains: bool) -> None:
    """Every layer is seen, the output stays the same to the bit, and gradients are finite."""
    numbers = range(len(model.layers) + 1)

    def loss() -> mx.array:
        with tapped(model, hidden=numbers) as taps:
            model(TOKENS)
        return sum((taps.hidden[n].square().mean() for n in numbers), mx.array(0.0))

    classes = [type(layer) for layer in model.layers]
    with tapped(model, hidden=numbers) as taps:
        logits = model(TOKENS)
    assert [type(layer) for layer in model.layers] == classes
    assert mx.array_equal(logits, model(TOKENS)).item()
    assert mx.allclose(logits, plain, atol=1e-5).item()
    assert all(state.shape[:2] == TOKENS.shape for state in taps.hidden.values())
    if trains:
        _check_gradient(model, loss)


def _attention(model: Any, trains: bool, why: dict[str, str]) -> str:
    """The layers that show it: probabilities times values are what the fused kernel gives."""
    shown = [
        number
        for number in range(1, len(model.layers) + 1)
        if _works("attention", why, _check_layer, model, number)
    ]

    def loss() -> mx.array:
        with tapped(model, attention=shown) as taps:
            model(TOKENS)
        return sum((attention_probabilities(taps.attention[n])[..., 0].mean() for n in shown), mx.array(0.0))

    if not shown or (trains and not _works("attention", why, _check_gradient, model, loss)):
        return "none"
    if len(shown) == len(model.layers):
        return "all"
    why["attention"] = f"shown by layers {shown} of the {len(model.layers)} of the model tried"
    return "some"


def _check_layer(model: Any, number: int) -> None:
    with tapped(model, attention=[number]) as taps:
        model(TOKENS)
    _check_attention(taps.attention[number])


def _check_attention(attention: Attention) -> None:
    fused = mx.fast.scaled_dot_product_attention(
        attention.queries,
        attention.keys,
        attention.values,
        scale=attention.scale,
        mask="causal" if attention.mask is None else attention.mask,
        sinks=attention.sinks,
    )
    assert mx.allclose(_output(attention), fused, rtol=1e-4, atol=1e-5)


def _output(attention: Attention) -> mx.array:
    repeats = attention.queries.shape[1] // attention.values.shape[1]
    return attention_probabilities(attention) @ mx.repeat(attention.values, repeats, axis=1)


def _check_gradient(model: Any, loss: Any) -> None:
    try:
        _, gradients = nn.value_and_grad(model, loss)()
    except (AttributeError, ValueError):  # not set up as a module, or indices chosen by moving values
        raise ModelError("mlx-lm's own model has no gradient") from None
    largest = [mx.abs(gradient).max().item() for _, gradient in tree_flatten(gradients)]
    if not all(value < float("inf") for value in largest):
        raise ModelError("its gradient is not finite")
    assert max(largest) > 0


def _exits(model: Any, plain: mx.array) -> None:
    norm, head = final_norm(model), Head(model, plain.shape[-1])
    last = len(model.layers)
    with tapped(model, hidden=[last]) as taps:
        model(TOKENS)
    assert mx.allclose(head.logits(norm(taps.hidden[last])), plain, rtol=1e-4, atol=1e-5)


def measured() -> dict[str, Any]:
    """The content of support.json, measured now."""
    return {"mlx_lm": mlx_lm.__version__, "types": {name: measure(name) for name in model_types()}}


def table(content: dict[str, Any]) -> str:
    """docs/models.md."""
    types = {name: Support(**found) for name, found in content["types"].items()}
    lines = [INTRODUCTION.format(version=content["mlx_lm"], **_counts(types))]
    for name, found in types.items():
        if found.not_tried:
            lines.append(f"| `{name}` | ? | ? | ? | ? | ? | not tried: {found.not_tried} |")
            continue
        marks = [MARKS[mark] for mark in (found.hidden, found.attention, found.head, found.exits)]
        notes = "; ".join(f"{what.replace('_', ' ')}: {reason}" for what, reason in found.why.items())
        lines.append(f"| `{name}` | {' | '.join(marks)} | {MARKS[found.early_answers]} | {notes} |")
    lines += ["", *(f"- `{name}` is run as `{other}`" for name, other in sorted(MODEL_REMAPPING.items()))]
    return "\n".join(lines).replace("|  |", "| |") + "\n"


def _counts(types: dict[str, Support]) -> dict[str, int]:
    return {
        "all_types": len(types),
        "tried": sum(found.not_tried is None for found in types.values()),
        "hidden": sum(found.hidden is True for found in types.values()),
        "attention": sum(found.attention == "all" for found in types.values()),
        "some": sum(found.attention == "some" for found in types.values()),
        "head": sum(found.head == "exact" for found in types.values()),
        "exits": sum(found.exits is True for found in types.values()),
        "early": sum(found.early_answers is True for found in types.values()),
    }


def test_the_page_and_the_file_agree() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(read_support()), "run: python tests/test_support.py"


def test_the_list_has_every_model_type() -> None:
    types = read_support()["types"]
    assert list(types) == model_types()
    assert set(MODEL_REMAPPING.values()) <= set(types)
    assert sum("not_tried" not in found for found in types.values()) > 110


@pytest.mark.parametrize("model_type", VARIED)
def test_what_stands_there_is_so(model_type: str) -> None:
    assert measure(model_type) == read_support()["types"][model_type]


@pytest.mark.slow
def test_all_that_stands_there_is_so() -> None:
    """Types that could not be tried where the file was written are left out: here they may work."""
    types = read_support()["types"]
    assert {name: found for name, found in types.items() if "not_tried" not in found} == {
        name: measure(name) for name, found in types.items() if "not_tried" not in found
    }


def test_what_does_not_work_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"`objective.hidden_mse`: model type gemma3n .*logits") as caught:
        refuse_hidden("gemma3n", "objective.hidden_mse")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"`student.model`: model type gemma2 .*hidden states or logits"):
        refuse_attention("gemma2", "student.model")
    with pytest.raises(ModelError, match="model type falcon_mamba does not show its attention"):
        refuse_attention("falcon_mamba", "student.model")  # which mlx-lm runs as mamba
    with pytest.raises(ModelError, match=r"`objective.exits`: earlier layers of model type nanochat"):
        refuse_exits("nanochat", "objective.exits")


def test_what_works_or_is_unknown_is_not_refused() -> None:
    for model_type in ("llama", "mistral", "qwen3", "olmo", "of_tomorrow"):
        for refuse in (refuse_hidden, refuse_attention, refuse_exits):
            refuse(model_type, "student.model")
    refuse_attention("qwen3_next", "student.model")  # some layers show it
    assert support("of_tomorrow") == Support()
    assert support("mistral") == support("llama") != Support()


def test_every_refusal_has_its_reason() -> None:
    for name, found in read_support()["types"].items():
        known = Support(**found)
        for refuse, works in (
            (refuse_hidden, known.hidden is not False),
            (refuse_attention, known.attention != "none"),
            (refuse_exits, known.exits is not False),
        ):
            if works:
                refuse(name, "student.model")
            else:
                with pytest.raises(ModelError, match=name):
                    refuse(name, "student.model")


def test_a_model_that_hides_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks behind the table fail where a model does not do what they are for."""
    from mlx_lm.models import llama

    class Aside(llama.TransformerBlock):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (super().__call__(*args, **kwargs)[None],)

    def unpacked(self: Any, tokens: mx.array, *_: Any, **__: Any) -> mx.array:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, "causal")[0][0]
        return self.norm(hidden)

    monkeypatch.setattr(llama, "TransformerBlock", Aside)
    monkeypatch.setattr(llama.LlamaModel, "__call__", unpacked)
    found = measure("llama")
    assert found["hidden"] is False and "no (B, T, D) array" in found["why"]["hidden"]
    assert found["attention"] == "all"
    monkeypatch.setattr(llama, "scaled_dot_product_attention", lambda q, k, v, **_: q)
    assert measure("llama")["attention"] == "none"


if __name__ == "__main__":
    content = measured()
    FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(table(content), encoding="utf-8")
