"""Trained cells as model folders of other software. See README.md."""
