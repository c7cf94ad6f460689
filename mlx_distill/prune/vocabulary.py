"""A smaller vocabulary: the tokens that the rows to learn from use, in tokenizer, teacher and student alike.

The teacher's distribution over the tokens that stay is its old one, renormalised over them: softmax of the
same logits, without the others.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.asked import shown_to
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt, end_of_turn_ids
from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded, load_tokenizer, save_tokenizer
from mlx_distill.models.head import NAMES
from mlx_distill.progress import Progress, silent
from mlx_distill.prune.trimming import trim
from mlx_distill.reasoning import as_learned
from mlx_distill.recipe import Recipe

WHERE = "`student.prune.vocabulary`"
PROBE = 8  # tokens on which a cut model is compared with the whole one
# Types whose layers know tokens too, that write to the logits of some, or hide their last projection.
UNCUT = ("longcat_flash_ngram", "phi3small", "phixtral", "talkie")


def trimmed(tokenizer: Any, texts: Iterable[str]) -> tuple[Any, np.ndarray]:
    """A tokenizer that splits these texts alike and any other text into smaller pieces, and what stays.

    See `trimming.trim` for which tokens stay. Special tokens, chat template and end-of-turn tokens are those
    of the old one. The result has been saved and loaded as plain mlx-lm loads it.

    Args:
        tokenizer: mlx-lm's wrapper of a tokenizer with a tokenizers backend.

    Returns:
        mlx-lm's wrapper of the smaller one, and the old ids of its tokens, (V',) rising.

    Raises:
        ModelError: a tokenizer of another kind, or a text that would be split in another way.
    """
    before = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    used = {index for tokens in before.values() for index in tokens} | end_of_turn_ids(tokenizer)
    named = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} - {None}
    try:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("it has no tokenizer.json")
        tree, old = trim(json.loads(backend.to_str()), used | named)
    except ValueError as error:
        kind = type(getattr(tokenizer, "_tokenizer", tokenizer)).__name__
        raise ModelError(f"{WHERE}: this {kind} cannot be made smaller: {error}; leave it out") from None
    kept = np.array(old)
    small = _loaded(tokenizer, tree, {int(one): place for place, one in enumerate(old)})
    for text, tokens in before.items():
        if kept[small.encode(text, add_special_tokens=False)].tolist() != tokens:
            raise ModelError(
                f"{WHERE}: with the tokens that stay, the text {text[:60]!r} would be split in another way; "
                "leave it out"
            )
    return small, kept


def learned_texts(
    recipe: Recipe,
    rows: Mapping[str, Sequence[Row]],
    examples: Sequence[Row],
    tokenizer: Any,
    progress: Progress = silent,
) -> list[str]:
    """The texts that `tokenizer` is given for all that the student learns from, and the writer is shown.

    Rows of `data.valid` and `data.test` are none of them: what is measured must not decide what stays. Nor
    are rows longer than `data.max_tokens`.

    Args:
        rows: by key of `data`. examples: of `generate.examples`.
    """
    options, most = recipe.generate, recipe.data.max_tokens
    texts: dict[str, None] = {}
    learned = [(key, row) for key, found in rows.items() if key not in ("valid", "test") for row in found]
    with progress("tokens that the rows use", len(learned), "rows") as advance:
        for key, row in learned:
            advance()
            if key == "prompts":
                heard = _Heard(tokenizer)
                if len(encode_prompt(row, heard)) >= most:
                    continue
                if options.endpoint is None:
                    shown_to(heard, row, options, examples)
                texts |= dict.fromkeys(heard.texts)
                continue
            for one, _ in as_learned(row, recipe.data.reasoning):
                heard = _Heard(tokenizer)
                if len(encode(one, heard, count=recipe.data.count).tokens) <= most:
                    texts |= dict.fromkeys(heard.texts)
    return list(texts)


def vocabulary_config(config: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """The config.json of a model whose tokens are these old ones: its size, and every id that it names.

    An id that does not stay becomes null, or is left out of its list.
    """
    new = {int(old): place for place, old in enumerate(kept)}

    def renumbered(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: renumbered(name, one) for name, one in value.items()}
        if key == "vocab_size":
            return len(new)
        if not key.endswith(("token_id", "token_ids")):
            return value
        if isinstance(value, list):
            return [new[one] for one in value if one in new]
        return new.get(value)

    return {**{key: renumbered(key, value) for key, value in config.items()}, "vocab_size": len(new)}


def check_type(config: Mapping[str, Any]) -> None:
    """Refuse a model type whose tokens are known not to be two matrices that can be cut.

    Raises:
        ModelError: naming the type.
    """
    if config.get("model_type") in UNCUT:
        raise _refusal(config, "it holds more about them than an embedding and a last projection")


def with_vocabulary(loaded: Loaded, tokenizer: Any, kept: np.ndarray) -> Loaded:
    """The model with the rows of these tokens alone, in place: quantized, and of any type.

    Padding of the matrices goes too. Everything else stays the very arrays that it was.

    Args:
        tokenizer: the smaller one, which the result has.
        kept: old ids of its tokens, rising.

    Raises:
        ModelError: the model does not give the logits that it gave for these tokens, as where it has
            tables of tokens besides the embedding and the last projection.
    """
    check_type(loaded.config)
    model: Any = loaded.model
    ids = mx.array(kept, dtype=mx.int32)
    whole = model(ids[None, :PROBE])
    size = whole.shape[-1]
    if kept[-1] >= size:
        raise _refusal(loaded.config, f"its tokenizer has an id {kept[-1]}, and it gives {size} logits")
    wanted = whole[..., ids].astype(mx.float32)
    mx.eval(wanted)  # or it would hold the whole matrices
    for name, module in model.named_modules():
        holds_tokens = hasattr(module, "as_linear") or name.rpartition(".")[2] in NAMES
        if holds_tokens and "weight" in module and module["weight"].shape[0] == size:
            _keep_rows(module, ids, size)
    try:
        found = model(mx.arange(wanted.shape[1])[None]).astype(mx.float32)
    except (ValueError, IndexError) as error:
        raise _refusal(loaded.config, str(error).splitlines()[0][:200]) from None
    same = found.shape == wanted.shape
    if same:  # the same products, but in half precision perhaps added up in another order
        same = (mx.abs(found - wanted).max() <= 0.02 * mx.abs(wanted).max()).item()
    if not same:
        raise _refusal(loaded.config, "it holds more about them than an embedding and a last projection")
    return Loaded(model, vocabulary_config(loaded.config, kept), tokenizer)


def _keep_rows(module: nn.Module, ids: mx.array, size: int) -> None:
    """Cut an embedding or a projection, quantized or not, to the rows of these tokens."""
    for name, array in module.items():
        if isinstance(array, mx.array) and array.shape[0] == size:
            module[name] = array[ids]
    if isinstance(module, nn.QuantizedEmbedding):
        module.num_embeddings = len(ids)
    mx.eval(module.parameters())  # likewise


def _refusal(config: Mapping[str, Any], why: str) -> ModelError:
    kind = config.get("model_type")
    return ModelError(
        f"{WHERE}: the tokens of a {kind} model cannot be cut ({why}); leave it out, or use another model"
    )


def _loaded(tokenizer: Any, tree: dict[str, Any], new: dict[int, int]) -> Any:
    """The tokenizer of a tokenizer.json, all else as `tokenizer` has it, as it is loaded from a folder."""
    ends = sorted(new[index] for index in end_of_turn_ids(tokenizer) if index in new)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        small = load_tokenizer(Path(folder), {"eos_token_id": ends})
    wanted = {token: new[index] for token, index in tokenizer.get_vocab().items() if index in new}
    if small.get_vocab() != wanted:
        differ = sorted(wanted.items() ^ small.get_vocab().items())
        raise ModelError(
            f"{WHERE}: transformers numbers the tokens of a smaller {type(small._tokenizer).__name__} in its "
            f"own way ({differ[0][0]!r} among {len(differ)}); leave it out"
        )
    return small


class _Heard:
    """A tokenizer that keeps what it is asked to encode."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def encode(self, text: str, **options: Any) -> list[int]:
        self.texts.append(text)
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
