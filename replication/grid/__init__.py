"""Arms x seeds: plan, run on one machine, status."""
