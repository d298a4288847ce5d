"""Completions: sampling, on any number of processes; export."""
