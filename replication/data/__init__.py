"""From named sources of text to the token blocks of step k. Imports no torch, except in module.py."""
