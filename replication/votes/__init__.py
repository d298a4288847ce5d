"""The record of votes."""
