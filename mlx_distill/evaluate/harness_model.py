"""A model of ours as lm-evaluation-harness sees one. Imported only where `lm_eval` is installed."""

import contextlib
import json
from typing import Any, TextIO

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlx_distill.data.batch import Encoded
from mlx_distill.data.template import decode_answer, end_of_turn_ids, has_chat_template, opening
from mlx_distill.evaluate.harness import decoding
from mlx_distill.generate import generate
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate
from mlx_distill.progress import Progress
from mlx_distill.score import log_likelihoods

LONGEST = 2048  # tokens of a context, for a model whose config names no `max_position_embeddings`


class HarnessModel(TemplateLM):
    """Log-likelihoods and answers of a loaded model, in the order asked.

    Args:
        seed: of answers that are drawn.
        shown: where progress is written while the harness's own output is dropped.
    """

    def __init__(self, loaded: Loaded, options: Evaluate, seed: int, progress: Progress, shown: TextIO):
        super().__init__()
        self.loaded, self.options, self.seed, self.progress = loaded, options, seed, progress
        self.shown = shown
        self.tokenizer = loaded.tokenizer
        self.has_template = has_chat_template(loaded.tokenizer)
        self.vocabulary = max(loaded.tokenizer.get_vocab().values()) + 1
        self.longest = int(loaded.config.get("max_position_embeddings") or LONGEST)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context: the token that opens one, else one that ends one."""
        opens = self.tokenizer.bos_token_id
        return min(end_of_turn_ids(self.tokenizer)) if opens is None else opens

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a context; behind a token that opens a text unless a chat template wrote one."""
        if add_special_tokens is False or self.has_template:
            return self.tokenizer.encode(string, add_special_tokens=False)
        return opening(string, self.tokenizer)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, its first token included, in windows that the model can read."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            some = get_rolling_token_windows(tokens, self.prefix_token_id, self.longest, context_len=1)
            found = [(None, *make_disjoint_window(window)) for window in some]
            windows, counts = windows + found, [*counts, len(found)]
        summed = iter(self._loglikelihood_tokens(windows))
        return [sum(next(summed)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        rows, places = [], []
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for place, (_, context, continuation) in enumerate(requests):
            if continuation:
                tokens = [*context, *continuation][-self.longest - 1 :]
                rows.append(Encoded(tokens, max(1, len(tokens) - len(continuation))))
                places.append(place)
        with contextlib.redirect_stderr(self.shown):
            title = "harness: log-likelihoods"
            found = log_likelihoods(
                self.loaded.model, rows, self.vocabulary, title=title, progress=self.progress
            )
        for place, one in zip(places, found, strict=True):
            results[place] = one
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop strings."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        for places in alike.values():
            until, most, sampling = decoding(requests[places[0]].args[1], self.options.max_tokens)
            room = max(1, self.longest - most)
            with contextlib.redirect_stderr(self.shown):
                written = generate(
                    self.loaded.model,
                    [self.tok_encode(requests[place].args[0])[-room:] for place in places],
                    end_of_turn_ids(self.tokenizer),
                    max_tokens=most,
                    batch_size=self.options.batch_size,
                    sampling=sampling,
                    seed=self.seed,
                    vocabulary=self.vocabulary,
                    title="harness: answers",
                    progress=self.progress,
                )
            for place, answer in zip(places, written, strict=True):
                text = decode_answer(answer.tokens, self.tokenizer)
                ends = [at for stop in until if (at := text.find(stop)) >= 0]
                answers[place] = text[: min(ends, default=None)]
        return answers
