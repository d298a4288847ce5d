"""Replicate an early language-model training result: token gain and layer gain, over many seeds."""

__version__ = "0.1.0"
