"""Rows: from files, folders, the Hub and the embedded corpora to batches of tokens."""
