"""The steps of `step_bench.py` in PyTorch: the same llama, by transformers, on one thread."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM


def steps(sizes: dict[str, Any], vocabulary: int, batch: Any) -> dict[str, Callable[[], None]]:
    """A plain step, one with a live teacher, and that teacher alone; losses at the counted places only."""
    torch.set_num_threads(1)
    tokens, labels = (torch.from_numpy(np.array(a, dtype=np.int64)) for a in (batch.tokens, batch.labels))
    counted = torch.from_numpy(np.array(batch.counted))
    labels = labels[counted]
    shape = {key: value for key, value in sizes.items() if key != "model_type"}
    config = LlamaConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False)
    student, plain_model, teacher = (LlamaForCausalLM(config).train(mode) for mode in (True, True, False))
    teacher.requires_grad_(False)

    def at_counted(model: LlamaForCausalLM) -> torch.Tensor:
        return model.lm_head(model.model(tokens).last_hidden_state[counted])

    def finish(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    of_plain, of_student = (torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (plain_model, student))

    def plain() -> None:
        finish(of_plain, plain_model, cross_entropy(at_counted(plain_model), labels))

    def live() -> None:
        with torch.no_grad():
            log_p = log_softmax(at_counted(teacher), dim=-1)
        log_q = log_softmax(at_counted(student), dim=-1)
        finish(of_student, student, kl_div(log_q, log_p, reduction="batchmean", log_target=True))

    def forward() -> None:
        with torch.no_grad():
            at_counted(teacher)

    return {"torch plain": plain, "torch live": live, "torch teacher": forward}
