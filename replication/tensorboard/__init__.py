"""Curves over seeds for TensorBoard."""
