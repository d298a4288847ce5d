"""The audit of a paper's published data."""
