"""Votes: the record, the note beside it, their tally and the published filters."""
