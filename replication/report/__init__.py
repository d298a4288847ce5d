"""The report of a suite."""
