"""Pure statistics with the seed as the unit."""
