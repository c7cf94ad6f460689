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


def load(name: str, where: str, *, lazy: bool = False) -> Loaded:
    """Load a model folder or Hub repository, after its files were checked.

    Args:
        name: folder, `org/name`, or `embedded` for the teacher that comes with the package.
        where: the recipe key that named it, for messages.
        lazy: read no weight before it is used, for who makes something smaller of them.

    Raises:
        NotFound, ModelError: no such model, or its files are damaged or of an unknown type.
    """
    from mlx_lm.utils import load_model

    folder = model_folder(name, where)
    try:
        model, config = load_model(folder, lazy=lazy, model_config=_rope(folder))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"`{where}`: {folder}: mlx-lm cannot load this model ({reason[:200]})") from None
    return Loaded(model, config, load_tokenizer(folder, config))


def check_architecture(folder: Path, where: str) -> None:
    """Refuse a model type that mlx-lm does not have, before its weights are read."""
    from mlx_lm.utils import _get_classes

    config = json.loads((folder / "config.json").read_text())
    try:
        _get_classes(config)
    except ValueError as error:
        raise ModelError(f"`{where}`: {folder}: {error}") from None


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """The tokenizer of a model folder, with every end-of-turn id that its config names."""
    from mlx_lm.tokenizer_utils import load as load_wrapped

    read = json.loads((folder / "config.json").read_text()) if config is None else config
    ends = read.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():  # where instruct models name the end of a turn
        ends = json.loads(generation.read_text()).get("eos_token_id", ends)
    try:
        return load_wrapped(folder, {"trust_remote_code": False}, eos_token_ids=ends)
    except Exception as error:  # transformers raises whatever its many tokenizers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({reason[:200]})") from None


def build(shape: Shape, tokenizer: Any, seed: int) -> Loaded:
    """A new model of this shape, with random weights and one row a token of `tokenizer`."""
    from mlx_lm.utils import _get_classes

    config: dict[str, Any] = {key: value for key, value in shape.model_dump().items() if value is not None}
    config["num_key_value_heads"] = shape.num_key_value_heads or shape.num_attention_heads
    config["head_dim"] = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    config["vocab_size"] = len(tokenizer)
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
    this one does neither.
    """
    from mlx_lm.utils import save_config, save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, loaded.model, donate_model=False)
    save_config(dict(loaded.config), config_path=folder / "config.json")
    loaded.tokenizer.save_pretrained(folder)


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


def _rope(folder: Path) -> dict[str, Any]:
    """`rope_theta` at the top level, where mlx-lm's llama and qwen2 look for it.

    Configs of transformers 5 nest it in `rope_parameters`; those two models would silently use
    their default base.
    """
    config = json.loads((folder / "config.json").read_text())
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested and "rope_theta" not in config:
        return {"rope_theta": nested["rope_theta"]}
    return {}
