"""Metrics of five models, as evaluation.json has them."""

from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "teacher": {"pass@1": 0.958, "pass@1_stderr": 0.006343, "problems": 1000,
                "sandbox": "unshare", "nll": 0.0712,
                "bits_per_byte": 0.0713, "parameters": 1029312, "size_mib": 3.927,
                "prefill_tokens_per_second": 21400.7, "decode_tokens_per_second": 1210.3,
                "peak_memory_gib": 0.412,
                "joules_per_token": None, "joules_per_token_why": "energy is measured on macOS only"},
    "student_before": {"pass@1": 0.0, "pass@1_stderr": 0.0, "problems": 1000, "nll": 6.2413, "kl": 6.1705,
                       "kl_p95": 7.9122, "top1_agreement": 0.0021, "bits_per_byte": 6.249,
                       "parameters": 196608, "size_mib": 0.751, "prefill_tokens_per_second": 88012.0,
                       "decode_tokens_per_second": 3320.0, "peak_memory_gib": 0.221},
    "baseline": {"pass@1": 0.243, "pass@1_stderr": 0.01356, "problems": 1000, "nll": 0.9718, "kl": 0.9511,
                 "kl_p95": 5.113, "top1_agreement": 0.8012, "bits_per_byte": 0.973, "parameters": 196608,
                 "size_mib": 0.751, "prefill_tokens_per_second": 87633.0, "decode_tokens_per_second": 3301.0,
                 "peak_memory_gib": 0.221, "train_tokens": 1331200, "train_seconds": 91.4},
    "student": {"pass@1": 0.881, "pass@1_stderr": 0.01024, "problems": 1000, "nll": 0.1933, "kl": 0.1204,
                "kl_p95": 0.6125, "top1_agreement": 0.9634, "bits_per_byte": 0.1935, "parameters": 196608,
                "size_mib": 0.751, "prefill_tokens_per_second": 87544.0, "decode_tokens_per_second": 3290.0,
                "peak_memory_gib": 0.221, "train_tokens": 1340416, "train_seconds": 118.2,
                "joules_per_token": None, "joules_per_token_why": "energy is measured on macOS only"},
    "student-4bit": {"pass@1": 0.86, "pass@1_stderr": 0.01097, "problems": 1000, "nll": 0.2145, "kl": 0.1441,
                     "kl_p95": 0.7, "top1_agreement": 0.9522, "bits_per_byte": 0.2147, "parameters": 196608,
                     "size_mib": 0.2442, "prefill_tokens_per_second": 61233.0,
                     "decode_tokens_per_second": 3711.0, "peak_memory_gib": 0.204},
}  # fmt: skip
