"""Evaluations of trained cells: tasks, text files, completions. See README.md."""
