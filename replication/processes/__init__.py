"""The processes of a run: the launcher, and requests to stop."""
