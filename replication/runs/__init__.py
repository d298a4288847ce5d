"""The files of an output folder: layout, journal, manifest."""
