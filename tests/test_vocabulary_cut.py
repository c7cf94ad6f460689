"""A smaller vocabulary: tokenizer, teacher and student keep the tokens that the rows use."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import tiny_model, tiny_recipe
from tiny_configs import model_types, tiny_of
from workshop import command, make

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import end_of_turn_ids
from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.evaluate.fresh import fresh_look
from mlx_distill.evaluate.model import TestSet, measure
from mlx_distill.models.head import Head
from mlx_distill.options import Evaluate, NewTokenizer
from mlx_distill.preflight import prepare
from mlx_distill.prune import trimming
from mlx_distill.prune.trimming import trim
from mlx_distill.prune.vocabulary import UNCUT, learned_texts, trimmed, vocabulary_config, with_vocabulary
from mlx_distill.recipe import decode, load
from mlx_distill.tokenizer import train_tokenizer

TEXTS = [f"{row.prompt}{row.completion}" for row in pocket.rows("code", "train", 30)]
FOREIGN = ["naïve 😀 日本語 Größe", "Quick zebras\n\tjump  over 12", " x", "x ", "\n", ""]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


def embedded(repository: Path, request: pytest.FixtureRequest) -> Any:
    return models.load_tokenizer(repository / "mlx_distill" / "assets" / "teacher")


def spelled_in_bytes(repository: Path, request: pytest.FixtureRequest) -> Any:
    texts = [f"{row.prompt}{row.completion}" for row in pocket.rows("both", "train", 200)]
    tokenizer = train_tokenizer([*texts, "ä b Größe"], NewTokenizer(pieces=600))
    tokenizer.chat_template = CHAT
    return tokenizer


def stories(repository: Path, request: pytest.FixtureRequest) -> Any:
    return models.load_tokenizer(request.getfixturevalue("shared") / "models" / "stories260K")


def qwen(repository: Path, request: pytest.FixtureRequest) -> Any:
    folder = request.getfixturevalue("shared") / "tokenizers" / "qwen2.5"
    return models.load_tokenizer(folder, {"eos_token_id": [151645, 151643]})


def unigram(repository: Path, request: pytest.FixtureRequest) -> Any:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    letters = [(chr(code), -9.0) for code in range(32, 127)]
    words = [("de", -3.0), ("def", -4.0), ("f▁", -4.5), ("re", -3.0), ("return", -5.0), ("▁x", -4.0)]
    pieces = [("<unk>", 0.0), *letters, ("▁", -6.0), ("\n", -6.0), ("zq", -3.0), *words, ("</s>", 0.0)]
    tokenizer = Tokenizer(Unigram(pieces, 0, False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    # Special tokens behind all others, where their ids change, and one that opens a whole text.
    special = [("</s>", len(pieces) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=special)
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    )


@pytest.fixture(params=[embedded, spelled_in_bytes, unigram, stories, qwen], ids=lambda made: made.__name__)
def tokenizer(request: pytest.FixtureRequest, repository: Path) -> Any:
    return request.param(repository, request)


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_texts_are_split_alike_and_any_other_text_is_spelled(tokenizer: Any) -> None:
    small, kept = trimmed(tokenizer, TEXTS)
    assert (np.diff(kept) > 0).all() and len(kept) < len(tokenizer)
    assert sorted(small.get_vocab().values()) == list(range(len(kept))), "ids without gaps"
    assert {token: kept[index] for token, index in small.get_vocab().items()}.items() <= (
        tokenizer.get_vocab().items()
    ), "each new id stands for the token of its old one"
    for text in TEXTS:
        assert kept[plain(small, text)].tolist() == plain(tokenizer, text)
    for text in FOREIGN:
        assert small.decode(plain(small, text)) == tokenizer.decode(plain(tokenizer, text))
        assert len(plain(small, text)) >= len(plain(tokenizer, text))


def test_special_tokens_are_the_old_ones(tokenizer: Any) -> None:
    small, kept = trimmed(tokenizer, TEXTS)
    assert set(kept[sorted(end_of_turn_ids(small))]) == end_of_turn_ids(tokenizer)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id"):
        now, old = getattr(small, name), getattr(tokenizer, name)
        assert (None if now is None else kept[now]) == old, name
    old = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    assert {token.content: kept[index] for index, token in small.added_tokens_decoder.items()} == old
    for text in [*old, *(f"x{token}def" for token in old)]:
        assert kept[plain(small, text)].tolist()[-1] in (old.get(text), plain(tokenizer, text)[-1])
    # What stands around a text as a whole, such as <s>.
    assert kept[small.encode(TEXTS[0])].tolist() == tokenizer.encode(TEXTS[0])
    assert type(small._tokenizer) is type(tokenizer._tokenizer)


def test_it_is_saved_and_loaded_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    small, _ = trimmed(tokenizer, TEXTS)
    small.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(tmp_path, {"eos_token_id": sorted(end_of_turn_ids(small))})
    assert loaded.get_vocab() == small.get_vocab()
    assert end_of_turn_ids(loaded) == end_of_turn_ids(small)
    for text in [*TEXTS[:5], *FOREIGN]:
        assert loaded.encode(text) == small.encode(text)
    asked = [{"role": "user", "content": TEXTS[0]}]
    if tokenizer.chat_template is not None:
        told = [one.apply_chat_template(asked, tokenize=False) for one in (tokenizer, small, loaded)]
        assert told[0] == told[1] == told[2]


def test_it_speaks_token_by_token(tokenizer: Any) -> None:
    """The detokenizer that mlx-lm chooses for the smaller tokenizer says what the old one's says."""
    if not tokenizer.name_or_path:
        pytest.skip("not loaded from a folder, where mlx-lm chooses a detokenizer")
    small, _ = trimmed(tokenizer, TEXTS)
    said = []
    for one in (tokenizer, small):
        detokenizer = one.detokenizer
        for token in plain(one, TEXTS[0]):
            detokenizer.add_token(token)
        detokenizer.finalize()
        said.append(detokenizer.text)
    assert said[0] == said[1]


def test_without_the_pieces_on_the_way_texts_are_split_otherwise(
    repository: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual mistake: the tokens in use alone. `return` is then there, and nothing leads to it."""
    tokenizer = embedded(repository, request)
    monkeypatch.setattr(trimming, "_path", lambda piece, ranks: set())
    with pytest.raises(ModelError, match=r"the text 'return' would be split in another way"):
        trimmed(tokenizer, ["return"])
    monkeypatch.undo()
    small, kept = trimmed(tokenizer, ["return"])
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    [token] = plain(small, "return")
    whole = tokenizer.convert_ids_to_tokens([int(kept[token])])[0]
    way = sorted(piece for piece in trimming._path(whole, _ranks(tree)) if 1 < len(piece) < len(whole))
    assert way, "there is a way to break"
    for piece in way:  # each piece on it is needed
        from tokenizers import Tokenizer

        broken, _ = trim(tree, [])
        left = {*trimming._path(whole, _ranks(tree)), *broken["model"]["vocab"]} - {piece}
        vocabulary = {one: place for place, one in enumerate(sorted(left))}
        merges = [m for m in tree["model"]["merges"] if {*m, "".join(m)} <= left]
        model = {**tree["model"], "vocab": vocabulary, "merges": merges}
        split = Tokenizer.from_str(json.dumps({**tree, "model": model, "added_tokens": []}))
        assert split.encode("return").tokens != [whole]


def _ranks(tree: dict[str, Any]) -> trimming.Ranks:
    return {(left, right): rank for rank, (left, right) in enumerate(tree["model"]["merges"])}


def test_what_stays_of_a_tokenizer_with_bytes(repository: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = spelled_in_bytes(repository, request)
    small, _ = trimmed(tokenizer, ["def"])
    there = small.get_vocab()
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= there.keys()
    assert "ä" in tokenizer.get_vocab() and "ä" not in there, "a character that two bytes spell"
    assert "▁" in there, "its bytes would be decoded as the mark, not as a space"
    assert small.decode(plain(small, "ä b")) == "ä b"
    assert "ä" in trimmed(tokenizer, ["ä"])[0].get_vocab()


def test_words_that_no_join_leads_to_stay_whole() -> None:
    """With `ignore_merges` a word is looked up whole first, as in Llama 3."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["</s>", "a", "b", "c", "bc", "ab", "abc", "cab"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c")], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    small, kept = trimmed(whole, ["abc abcc"])
    assert small.convert_ids_to_tokens(plain(small, "abc abcc")) == ["abc", "ab", "c", "c"]
    assert kept.tolist() == [0, 1, 2, 3, 5, 6]


def test_ids_elsewhere_in_the_file(repository: Path, request: pytest.FixtureRequest) -> None:
    tree = json.loads(unigram(repository, request).backend_tokenizer.to_str())
    end = tree["added_tokens"][-1]["id"]
    tree["padding"] = {"strategy": "BatchLongest", "pad_id": end, "pad_token": "</s>"}
    processor = tree["post_processor"]
    tree["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]}
    small, kept = trim(tree, [])
    assert kept[-1] == end
    assert small["padding"]["pad_id"] == len(kept) - 1 < end
    processors = small["post_processor"]["processors"]
    assert processors[1]["special_tokens"]["</s>"]["ids"] == [len(kept) - 1]
    assert [token["id"] for token in small["added_tokens"]] == [0, len(kept) - 1]
    assert small["model"]["unk_id"] == 0


def test_the_old_tokenizer_is_left_as_it_was(repository: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = embedded(repository, request)
    before = tokenizer.backend_tokenizer.to_str()
    trimmed(tokenizer, TEXTS[:2])
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree["model"].update(type="WordPiece"), "its model is WordPiece"),
        (lambda tree: tree["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (
            lambda tree: tree.update(post_processor={"type": "BertProcessing", "sep": ["</s>", 1]}),
            "post-processor BertProcessing",
        ),
    ],
)
def test_tokenizers_that_cannot_be_cut(
    change: Any, said: str, repository: Path, request: pytest.FixtureRequest
) -> None:
    tree = json.loads(embedded(repository, request).backend_tokenizer.to_str())
    change(tree)
    with pytest.raises(ValueError, match=said):
        trim(tree, [])


def test_a_tokenizer_in_python_is_refused() -> None:
    class Slow:
        bos_token_id = pad_token_id = unk_token_id = None
        eos_token_id = 0

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0]

    with pytest.raises(ModelError, match=r"this Slow cannot be made smaller: it has no tokenizer.json"):
        trimmed(Slow(), ["x"])


KEPT = np.array([0, 1, 4, 9, 30, 31, 49])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_cut_model_gives_the_logits_of_the_tokens_that_stay(tied: bool, bits: int | None) -> None:
    loaded = tiny_model(64, seed=3, tie_word_embeddings=tied, hidden_size=64, num_attention_heads=2)
    loaded.config.update({"eos_token_id": [1, 49, 60], "pad_token_id": 60, "bos_token_id": 9})
    if bits is not None:
        nn.quantize(loaded.model, 32, bits)
    tokens = np.array([[2, 5, 0, 6, 3]])
    before = np.array(loaded.model(mx.array(KEPT[tokens])))
    hidden = np.array(Head(loaded.model, 64).hidden(mx.array(KEPT[tokens])))
    model: Any = loaded.model
    projection = model.model.embed_tokens if tied else model.lm_head
    rows_of = {name: np.array(array) for name, array in projection.parameters().items()}
    count = models.parameter_count(loaded.model)
    cut = with_vocabulary(loaded, "the smaller tokenizer", KEPT)
    after = np.array(cut.model(mx.array(tokens)))
    assert after.shape[-1] == len(KEPT), "padding of the matrix goes too"
    # A product with fewer columns may add in another order; all that goes into it is the same, bit for bit.
    np.testing.assert_allclose(after, before[..., KEPT], rtol=0, atol=2e-6)
    assert (np.array(Head(cut.model, len(KEPT)).hidden(mx.array(tokens))) == hidden).all()
    assert all((np.array(projection[name]) == rows[KEPT]).all() for name, rows in rows_of.items())
    # Its distribution is the old one, renormalised over what stays.
    whole = np.exp(before.astype(np.float64))
    wanted = whole[..., KEPT] / whole[..., KEPT].sum(-1, keepdims=True)
    found = np.exp(after.astype(np.float64))
    np.testing.assert_allclose(found / found.sum(-1, keepdims=True), wanted, rtol=1e-5)
    assert np.abs(whole[..., KEPT] / whole.sum(-1, keepdims=True) - wanted).max() > 0.1
    assert cut.tokenizer == "the smaller tokenizer"
    rows = (64 - len(KEPT)) * 64 * (1 if tied else 2)
    if bits is None:
        assert models.parameter_count(cut.model) == count - rows
    assert cut.config["vocab_size"] == len(KEPT)
    assert (cut.config["eos_token_id"], cut.config["bos_token_id"]) == ([1, 6], 3)
    assert cut.config["pad_token_id"] is None


@pytest.mark.slow
def test_a_fresh_process_opens_a_cut_qwen(
    repository: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Transformers builds Qwen's tokenizer anew from its pieces, whatever tokenizer.json says."""
    from mlx_lm.utils import _get_classes

    tokenizer = qwen(repository, request)
    config: dict[str, Any] = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151_936,
        "eos_token_id": [151_645, 151_643],
        "bos_token_id": 151_643,
    }
    model_class, arguments = _get_classes(config)
    whole = models.Loaded(model_class(arguments.from_dict(config)), config, tokenizer)
    small, kept = trimmed(tokenizer, TEXTS)
    cut = with_vocabulary(whole, small, kept)
    models.save(tmp_path, cut)
    probe = plain(small, TEXTS[0])
    look = fresh_look(tmp_path, probe, text=TEXTS[1])
    assert kept[look.tokens].tolist() == plain(tokenizer, TEXTS[1])
    np.testing.assert_allclose(look.logits, np.array(cut.model(mx.array([probe])))[0], atol=1e-5)
    again = models.load_tokenizer(tmp_path)
    assert set(kept[sorted(end_of_turn_ids(again))]) == {151_645, 151_643}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["vocab_size"] == len(kept)


def test_ids_of_a_config() -> None:
    config = {
        "vocab_size": 50,
        "eos_token_id": 49,
        "image_token_id": 9,
        "hidden_size": 31,
        "text_config": {"vocab_size": 50, "bos_token_id": 30, "layer_types": ["x"]},
    }
    assert vocabulary_config(config, KEPT) == {
        "vocab_size": 7,
        "eos_token_id": 6,
        "image_token_id": 3,
        "hidden_size": 31,
        "text_config": {"vocab_size": 7, "bos_token_id": 4, "layer_types": ["x"]},
    }
    assert config["vocab_size"] == 50
    assert vocabulary_config({"model_type": "llama"}, KEPT)["vocab_size"] == 7, "some types have a default"


def test_a_model_that_holds_more_about_its_tokens_is_refused() -> None:
    loaded = tiny_model(50)
    table = mx.random.normal((60, 1), key=mx.random.key(0))
    plain_class = type(loaded.model)
    loaded.model.__class__ = type(
        "Biased", (plain_class,), {"__call__": lambda self, x: plain_class.__call__(self, x) + table[x]}
    )
    with pytest.raises(ModelError, match=r"tokens of a llama model cannot be cut .*more about them"):
        with_vocabulary(loaded, None, KEPT)


def test_types_known_not_to_work_are_refused_before_they_run() -> None:
    loaded = tiny_model(50)
    loaded.config["model_type"] = "phi3small"
    with pytest.raises(ModelError, match=r"tokens of a phi3small model cannot be cut"):
        with_vocabulary(loaded, None, KEPT)
    assert models.parameter_count(loaded.model) == models.parameter_count(tiny_model(50).model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in model_types() if kind not in UNCUT])
def test_every_type_of_mlx_lm(kind: str) -> None:
    try:
        model = tiny_of(kind)
        model(mx.array([[0, 1]]))
    except (Exception, SystemExit) as error:
        pytest.skip(f"{kind} cannot run here: {str(error)[:100]}")
    with_vocabulary(models.Loaded(model, {"model_type": kind}, None), None, KEPT)


def test_a_model_with_fewer_logits_than_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"its tokenizer has an id 49, and it gives 40 logits"):
        with_vocabulary(tiny_model(40), None, KEPT)


def test_rows_to_learn_from_decide(repository: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = embedded(repository, request)
    rows = {
        "train": [Row(prompt="short", completion=" one"), Row(prompt="long" * 9, completion="er")],
        "prompts": [Row(prompt="asked"), Row(prompt="too long" * 9)],
        "replay.0": [Row(text="again")],
        "valid": [Row(text="watched")],
        "test": [Row(text="measured")],
    }
    examples = [Row(prompt="shown", completion=" first")]
    texts = learned_texts(tiny_recipe(data={"max_tokens": 16}), rows, examples, tokenizer)
    assert {"short", " one", "asked", "shown", " first", "again"} <= {*texts}
    said = " ".join(texts)
    assert "long" not in said and "watched" not in said and "measured" not in said


def test_recipes_that_contradict_it() -> None:
    tree = {
        "name": "tiny",
        "student": {"prune": {"vocabulary": True}},
        "teacher": {"model": "embedded"},
        "data": {"train": "x.jsonl"},
        "objective": {"forward_kl": {}},
        "train": {"steps": 4},
    }
    decode(tree)
    with pytest.raises(RecipeError, match=r"vocabulary. cuts the tokens of teacher and student alike"):
        decode({**tree, "objective": {"cross_tokenizer": {}}})
    with pytest.raises(RecipeError, match=r"vocabulary. keeps the tokens .* `data.prompts` alone show no"):
        decode({**tree, "data": {"prompts": "x.jsonl"}})
    decode({**tree, "data": {"prompts": "x.jsonl", "replay": ["y.jsonl"]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("workshop"))
    rows = [{"prompt": "class Größe:", "completion": " pass"}]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


FAST = [
    "train.steps=2",
    "evaluate={baseline: false, tasks: [fidelity]}",
    "train.compile=false",
    "data.test=other.jsonl",
]
CUT = "student={prune: {vocabulary: true}}"


def test_a_run_with_a_smaller_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["data.prompts=good.jsonl", "generate={max_tokens: 60, temperature: 1.0}"]
    ended = command(folder, capsys, "run", "recipe.yaml", "name=cut", *FAST, *asked, CUT)
    assert ended.code == 0, ended.err
    out = folder / "runs" / "cut"
    answers = [
        json.loads(line)
        for line in (out / "samples" / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any(answer["kept"] for answer in answers), "the teacher answers with the tokens that stay"
    config = json.loads((out / "models" / "student" / "config.json").read_text(encoding="utf-8"))
    teacher = json.loads((folder / "teacher" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] < teacher["vocab_size"]
    assert {**config, "vocab_size": 0} == {**teacher, "vocab_size": 0}
    metrics = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert metrics["teacher"]["parameters"] == metrics["student"]["parameters"]
    assert metrics["student_before"]["kl"] < 1e-6, "both were cut alike"
    assert metrics["teacher"]["size_mib"] == pytest.approx(metrics["student"]["size_mib"], rel=0.01)
    student = models.load(str(out / "models" / "student"), "x")
    assert max(student.tokenizer.get_vocab().values()) + 1 == config["vocab_size"]
    assert student.tokenizer.decode(student.tokenizer.encode("def add(x, 3):")) == "def add(x, 3):"
    assert "class" not in student.tokenizer.get_vocab(), "the test decides nothing"


def test_a_cache_of_a_smaller_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = "teacher={model: teacher, source: cache, top_k: 8, cache: shared}"
    arguments = ["run", "recipe.yaml", "name=cached", *FAST, "export={formats: []}", cached]
    ended = command(folder, capsys, *arguments, CUT.replace("true", "true, ratio: 0.4"))
    assert ended.code == 0, ended.err
    assert re.search(r"cut out: .*vocabulary 150 -> \d\d[,;]", ended.out), ended.out
    metrics = json.loads((folder / "runs" / "cached" / "evaluation.json").read_text(encoding="utf-8"))[
        "models"
    ]
    whole = models.parameter_count(models.load(str(folder / "teacher"), "x").model)
    assert metrics["student"]["parameters"] <= 0.4 * whole, "a share of the weights on disk"
    ended = command(folder, capsys, *arguments, "name=whole", "student={prune: {ratio: 0.5}}")
    assert ended.code == 2 and "shared" in ended.err[-1], "targets over other tokens"


def test_a_teacher_in_few_bits_is_cut_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = models.load(str(folder / "teacher"), "x")
    nn.quantize(loaded.model, 32, 8)
    loaded.config["quantization"] = {"bits": 8, "group_size": 32}
    models.save(folder / "teacher-8bit", loaded)
    cut = CUT.replace("true", "true, model: teacher")
    arguments = ["recipe.yaml", "name=bits", *FAST, "export={formats: []}", "teacher.model=teacher-8bit", cut]
    ended = command(folder, capsys, "run", *arguments)
    assert ended.code == 0, ended.err
    metrics = json.loads((folder / "runs" / "bits" / "evaluation.json").read_text(encoding="utf-8"))["models"]
    config = json.loads(
        (folder / "runs" / "bits" / "models" / "student" / "config.json").read_text(encoding="utf-8")
    )
    less = (150 - config["vocab_size"]) * config["hidden_size"]
    assert metrics["teacher"]["parameters"] == models.parameter_count(loaded.model) - less
    assert 1e-6 < metrics["student_before"]["kl"] < 1e-2, "what it was cut from has more bits"


def test_a_teacher_that_is_rounded_as_it_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounded = "teacher={model: teacher, quantize: {bits: 8, group_size: 32}}"
    arguments = ["recipe.yaml", "name=rounded", *FAST, "export={formats: []}", rounded, CUT]
    ended = command(folder, capsys, "run", *arguments)
    assert ended.code == 0, ended.err
    metrics = json.loads((folder / "runs" / "rounded" / "evaluation.json").read_text(encoding="utf-8"))[
        "models"
    ]
    assert metrics["teacher"]["parameters"] == metrics["student"]["parameters"]
    assert metrics["teacher"]["size_mib"] < metrics["student"]["size_mib"] / 2
    assert 1e-6 < metrics["student_before"]["kl"] < 1e-2


def test_the_teacher_that_teaches_is_not_the_one_on_disk(folder: Path) -> None:
    loaded = models.load(str(folder / "teacher"), "x")
    encoded = [Encoded([1, 2, 3], 1)]
    test = TestSet([Row(text="x")], encoded, 1)
    cut = with_vocabulary(loaded, loaded.tokenizer, np.arange(100))
    options = Evaluate(tasks=["speed"])
    told: dict[str, Any] = {"teacher": None, "folder": folder / "teacher", "unlike": "it was cut"}
    metrics = measure("teacher", lambda: cut, test, options, 100, **told).metrics
    assert metrics["decode_tokens_per_second"] is None
    assert metrics["decode_tokens_per_second_why"] == "it was cut"
    assert metrics["size_mib"] == metrics["parameters"] * 4 / 2**20
    on_disk = measure(
        "teacher", lambda: cut, test, Evaluate(tasks=[]), 100, **{**told, "unlike": None}
    ).metrics
    assert on_disk["size_mib"] > metrics["size_mib"]


def test_other_rows_make_another_student(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New ids alone do not tell rows apart: the second token of one vocabulary is another's second."""
    pieces = models.load_tokenizer(folder / "teacher").get_vocab()
    pairs = [piece for piece in pieces if len(piece) == 2 and piece.isalpha()][:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = []
        for letters in pairs:
            Path("one.jsonl").write_text(json.dumps({"text": letters}) + "\n", encoding="utf-8")
            recipe = load("recipe.yaml", [CUT, "data={train: one.jsonl}", "evaluate.tasks=[]"])
            found.append(prepare(recipe))
    assert found[0].train == found[1].train
    assert found[0].fingerprint != found[1].fingerprint
