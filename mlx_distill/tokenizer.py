"""A sentencepiece tokenizer trained on the user's text, as a Hugging Face tokenizer."""

import io
from collections.abc import Iterable
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.options import NewTokenizer

UNKNOWN, END = "<unk>", "</s>"


def train_tokenizer(texts: Iterable[str], options: NewTokenizer) -> Any:
    """Train BPE pieces on `texts` and wrap them for mlx-lm.

    Text survives the round trip exactly: no dummy prefix, no normalisation, white space kept; each
    digit is a piece of its own, so that numbers are copied digit by digit. There is no
    beginning-of-text token; `</s>` ends a turn.

    Args:
        texts: the training text; newlines inside are kept.

    Raises:
        DataError: fewer different pieces in the text than asked for.
    """
    import sentencepiece
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=trained,
            model_type="bpe",
            vocab_size=options.pieces,
            byte_fallback=options.byte_fallback,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END,
            num_threads=1,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        where = f"`student.tokenizer.pieces`: {options.pieces}"
        raise DataError(f"{where} cannot be made of this text ({reason[-200:]})") from None

    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary),
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=options.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    detokenizer: Any = SPMStreamingDetokenizer  # mlx-lm's annotation names one class of several
    return TokenizerWrapper(wrapped, detokenizer)


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order in which BPE learned the third."""
    merges = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((index, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
