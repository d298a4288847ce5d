"""Model judges, over an API or by pasted sheets: the same pairs, both orders, every word kept."""
