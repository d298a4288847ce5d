"""The processes of a run: launcher, requests to stop, children."""
