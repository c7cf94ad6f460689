"""What every run has in common: where it lies, and its stages, in the order in which they happen."""

from pathlib import Path

ROOT = Path("runs")
FINGERPRINT = "fingerprint"  # the file that makes a folder a run's
STAGES = (
    "generate",
    "score",
    "cache",
    "prune",
    "train",
    "baseline",
    "quantize",
    "evaluate",
    "export",
    "report",
)
