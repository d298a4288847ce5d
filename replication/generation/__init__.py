"""Completions: sampling, workers, export."""
