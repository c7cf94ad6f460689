"""Model folders that MLX would read wrongly are refused by their headers."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.safetensors_check import INDEX, check_weights, read_config


def write(folder: Path, header: dict[str, Any] | str, data: bytes, name: str = "model.safetensors") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = folder / name
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(start: int, end: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def test_sound_weights_pass(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), {"a": mx.ones((3, 2)), "b": mx.array(1.0)})
    (tmp_path / "model-2.safetensors").write_bytes(save({"c": np.zeros((0, 2), np.float16)}))
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}), encoding="utf-8"
    )
    check_weights(tmp_path)


BAD_HEADERS = {
    "overlap": {"a": tensor(0, 8), "b": tensor(4, 12)},
    "hole": {"a": tensor(0, 8), "b": tensor(12, 20)},
    "beyond the end": {"a": tensor(0, 800, (200,))},
    "shape against offsets": {"a": tensor(0, 8, (3,))},
    "negative": {"a": tensor(-8, 0)},
    "backwards": {"a": tensor(8, 0)},
    "unknown type": {"a": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "no tensor": {"a": 3},
    "doubled name": '{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 8)),) * 2),
    "no object": "[]",
    "no JSON": "{",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name: str, tmp_path: Path) -> None:
    data = np.arange(5, dtype=np.float32).tobytes()[: {"overlap": 12, "hole": 20}.get(name, 8)]
    path = write(tmp_path, BAD_HEADERS[name], data)
    with pytest.raises(ModelError) as caught:
        check_weights(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["overlap", "doubled name"])
def test_mlx_reads_some_of_them(name: str, tmp_path: Path) -> None:
    """Why the check is there: should MLX begin to refuse these, it may go."""
    path = write(tmp_path, BAD_HEADERS[name], np.arange(3, dtype=np.float32).tobytes())
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    assert arrays["a"].tolist() == [0.0, 1.0]


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = save({"a": np.ones(4, np.float32), "b": np.ones((2, 3), np.float16)})
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="truncated.*fetch it again"):
            check_weights(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match="not a sound safetensors file"):
        check_weights(tmp_path)
    path.write_bytes(whole)
    check_weights(tmp_path)


def test_a_header_longer_than_any_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ModelError, match="a header of 18446744073709551615 bytes in a file of 10"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-2.safetensors"}}, "names model-2.safetensors, which is missing"),
        ({"weight_map": {"a": "x" * 5000}}, "names x{80}, which is missing"),
        ({"weight_map": {"a": "\0"}}, "which is missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside of the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of the folder"),
        ({"weight_map": {"b": "model.safetensors"}}, "b is not in model.safetensors, as it says"),
        ({"weight_map": {"a": 1}}, "no `weight_map`"),
        ({}, "no `weight_map`"),
        ([], "a JSON object is expected"),
    ],
)
def test_bad_index(index: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"a": tensor(0, 8)}, bytes(8))
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        check_weights(tmp_path)


def test_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"no model\*.safetensors, only .bin files; convert them"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "config.json",
            {"model_type": "llama", "model_file": "evil.py"},
            "`model_file` asks to run Python code",
        ),
        ("config.json", {"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}, "'mine' runs Python code"),
        ("config.json", {"model_type": 3}, "no `model_type`"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "tokenizer is Python code"),
        ("tokenizer_config.json", {"auto_map": ["x.Y", None]}, "tokenizer is Python code"),
        ("tokenizer_config.json", [], "a JSON object is expected"),
        ("config.json", {"model_type": "llama", "x": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_code_in_a_model_is_refused(file: str, content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_an_architecture_of_mlx_lm_needs_no_code_of_the_model(tmp_path: Path) -> None:
    """Phi-3 and others still carry `auto_map`, which mlx-lm passes over."""
    config = {"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("model_type", "known"),
    [("kimi_k2", True), ("phi-msft", True), ("../utils", False), ("a\0", False), ("x" * 5000, False)],
)
def test_a_type_that_mlx_lm_runs_as_another_is_its_own_too(
    model_type: str, known: bool, tmp_path: Path
) -> None:
    """Kimi K2 comes with `auto_map`, and mlx-lm has no kimi_k2.py: it runs it as deepseek_v3."""
    config = {"model_type": model_type, "auto_map": {"AutoConfig": "x.Y"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if known:
        assert read_config(tmp_path) == config
    else:
        with pytest.raises(ModelError, match="runs Python code; mlx-lm has none for it"):
            read_config(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size` is a whole number from 1 to 2147483647; got '0'"),
        ({"vocab_size": True}, "`vocab_size` is a whole number"),
        ({"num_experts": -1}, "`num_experts` is a whole number from 0"),
        ({"intermediate_size": [64, "x"]}, "`intermediate_size` is a whole number"),
        ({"text_config": {"head_dim": 1.5}}, r"`text_config\.head_dim` is a whole number"),
        ({"text_config": "x"}, "`text_config` is an object"),
    ],
)
def test_sizes_that_no_model_has(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **keys}), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_sizes_that_some_models_have(tmp_path: Path) -> None:
    config = {"model_type": "x", "head_dim": None, "num_experts": 0, "intermediate_size": [64, 0]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_config(tmp_path) == config
