"""Models and tokenizers: loaded, built from a shape, and saved. The one module that loads with mlx-lm."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_distill.errors import ModelError
from mlx_distill.hub import model_folder
from mlx_distill.keys import seed_global
from mlx_distill.options import Shape
from mlx_distill.safetensors_check import check_weights, read_object

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class Loaded(NamedTuple):
    """A model with what belongs to it."""

    model: nn.Module
    config: dict[str, Any]  # of config.json
    tokenizer: Any  # mlx-lm's TokenizerWrapper


def load(name: str, where: str, *, lazy: bool = False, trust: bool = False) -> Loaded:
    """Load a model folder or Hub repository, after its files were checked.

    Args:
        name: folder, `org/name`, or `embedded` for the teacher that comes with the package.
        where: the recipe key that named it, for messages.
        lazy: read no weight before it is used, for who makes something smaller of them.
        trust: its tokenizer may be Python code.

    Raises:
        NotFound, ModelError: no such model, or its files are damaged or of an unknown type.
    """
    folder = model_folder(name, where, trust=trust)
    model, config = _model_of(folder, where, lazy=lazy)
    _check_runs(model, f"`{where}`: {folder}")
    return Loaded(model, config, load_tokenizer(folder, config, trust=trust))


def check_model(folder: Path, where: str) -> None:
    """Refuse a folder of which mlx-lm makes no model that runs; no weight is read, and no number computed.

    The model is built of arrays that are never evaluated, compared with what the headers of its files tell,
    and given two tokens, so that every layer sees the shapes of what it will work on.

    Raises:
        ModelError: an unknown type, a setting that cannot be, or a tensor that is missing, too many or of
            another shape.
    """
    model, _ = _model_of(folder, where, lazy=True)
    _check_runs(model, f"`{where}`: {folder}")


def _check_runs(model: Any, place: str) -> None:
    """Give a model two tokens, and compute nothing."""
    try:
        model(mx.zeros((1, 2), dtype=mx.int32))
    except Exception as error:  # whatever the many models of mlx-lm raise
        raise ModelError(f"{place}: mlx-lm cannot run this model ({_reason(error)})") from None


def _model_of(folder: Path, where: str, *, lazy: bool) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import _get_classes, load_model

    known, place = read_object(folder / "config.json"), f"`{where}`: {folder}"
    try:
        _get_classes(known)
    except Exception as error:  # an unknown type, or `architectures` that are none
        raise ModelError(f"{place}: {_reason(error)}") from None
    try:
        return load_model(folder, lazy=lazy, model_config=_rope(known))
    except Exception as error:  # whatever the many models of mlx-lm raise
        reason = _reason(error)
        words = set(reason.replace(",", " ").split())
        file = next((file for name, file in check_weights(folder).items() if name in words), None)
        told = f" (see {file})" if file else ""
        raise ModelError(f"{place}: mlx-lm cannot load this model: {reason}{told}") from None


def _reason(error: Exception) -> str:
    """The message of a foreign error in one short line; its kind where it says nothing else."""
    said = " ".join(str(error).split()).rstrip(".")
    if len(said) < 20:  # such as the bare name of a missing key
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= 200 else said[:197] + "..."


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None, *, trust: bool = False) -> Any:
    """The tokenizer of a model folder, with every end-of-turn id that its config names.

    Args:
        trust: it may be Python code of the model's.
    """
    from mlx_lm.tokenizer_utils import load as load_wrapped

    read = read_object(folder / "config.json") if config is None else config
    ends = read.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():  # where instruct models name the end of a turn
        ends = read_object(generation).get("eos_token_id", ends)
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends] if ends else [])):
        raise ModelError(f"{folder}: `eos_token_id` is an id or a list of them; got {str(ends)[:40]!r}")
    try:
        loaded = load_wrapped(folder, {"trust_remote_code": trust}, eos_token_ids=ends)
        loaded.decode(loaded.encode("a b"))  # its options are believed until they are used
        return loaded
    except Exception as error:  # transformers raises whatever its many tokenizers raise
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({_reason(error)})") from None


def build(shape: Shape, tokenizer: Any, seed: int) -> Loaded:
    """A new model of this shape, with random weights and one row a token of `tokenizer`."""
    from mlx_lm.utils import _get_classes

    config: dict[str, Any] = {key: value for key, value in shape.model_dump().items() if value is not None}
    config["num_key_value_heads"] = shape.num_key_value_heads or shape.num_attention_heads
    config["head_dim"] = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    config["vocab_size"] = max(tokenizer.get_vocab().values()) + 1  # ids need not be without gaps
    config["eos_token_id"] = tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        config["bos_token_id"] = tokenizer.bos_token_id
    if shape.num_experts is not None:
        assert shape.num_experts_per_tok is not None
        # Experts in every layer. As in Qwen's configs, `intermediate_size` is what a token goes through.
        config |= {"moe_intermediate_size": shape.intermediate_size, "norm_topk_prob": True}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        config["intermediate_size"] *= shape.num_experts_per_tok
    config["architectures"] = [ARCHITECTURES[shape.model_type]]
    seed_global(seed, "initial weights")
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    return Loaded(model, config, tokenizer)


def save(folder: Path, loaded: Loaded) -> None:
    """Write a folder that plain `mlx_lm.load` opens.

    mlx-lm's own `save` empties the live model and copies every `*.py` of the source folder along;
    this one does neither. Nor does the folder name code that a reader should run.
    """
    from mlx_lm.utils import save_config, save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, loaded.model, donate_model=False)
    config = {key: value for key, value in loaded.config.items() if key != "auto_map"}
    save_config(config, config_path=folder / "config.json")
    save_tokenizer(folder, loaded.tokenizer)


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer as data, even one whose class is Python code: then as the plain class of its kind."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    if "auto_map" in config:
        del config["auto_map"]
        if is_code(tokenizer):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for code in folder.glob("*.py"):  # transformers copies what it loaded
        code.unlink()


def check_saveable(tokenizer: Any) -> None:
    """Refuse a tokenizer that a saved model could only have as Python code.

    Raises:
        ModelError: its class came with the model, and has no tokenizer.json behind it.
    """
    if is_code(tokenizer) and not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the student's tokenizer is Python code of the model and has no tokenizer.json, so no student "
            "could be saved with it; choose a student with a tokenizer of its own, and `cross_tokenizer`"
        )


def is_code(tokenizer: Any) -> bool:
    """Whether a tokenizer's class came with the model."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    return type(inner).__module__.startswith("transformers_modules.")


def fused(loaded: Loaded) -> Loaded:
    """The model with LoRA or DoRA matrices merged into the weights they adapt, in place."""
    layers = [
        (name, module.fuse()) for name, module in loaded.model.named_modules() if hasattr(module, "fuse")
    ]
    if layers:
        loaded.model.update_modules(tree_unflatten(layers))
    return loaded


def parameter_count(model: nn.Module) -> int:
    """Weights of a model; a quantized matrix counts as the matrix it stands for."""
    from mlx_lm.utils import get_total_parameters

    return get_total_parameters(model)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` at the top level, where mlx-lm's llama and qwen2 look for it.

    Configs of transformers 5 nest it in `rope_parameters`; those two models would silently use
    their default base.
    """
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested and "rope_theta" not in config:
        return {"rope_theta": nested["rope_theta"]}
    return {}
