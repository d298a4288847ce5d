"""Simulated votes: power and calibration."""
