"""Scores: of generated programs and summaries, of the numbers behind them, of speed and size."""
