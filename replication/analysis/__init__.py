"""From finished run folders to numbers, figures and a report. Imports no torch."""
