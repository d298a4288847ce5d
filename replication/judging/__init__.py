"""From completions to votes: pairs, blinding, the page, model judges. Knows no arm until the panel is locked."""
