"""The rubric in words: the page's template and the models' prompt are made from it, so that both judge by the same."""

from __future__ import annotations

TASK = (
    "Both were written by small language models at an early stage of training. Expect neither to be right: facts will "
    "be wrong, sums will be off."
)
COUNTS = "Four things count, and none of them alone:"
CRITERIA = {
    "Relevance": "It takes up the prompt: its topic, and what it asks for.",
    "Coherence": "Sentences hold together, and each follows from the one before.",
    "Diversity": "The words vary. It does not go round in loops or repeat a phrase.",
    "Human-likeness": "A person could have written it, if perhaps a mistaken one.",
}
BETTER = "One is the better attempt, if only by a little."
TIE = "Both are worth something, and about equally good."
BOTH_BAD = "Neither is worth anything: noise, loops, or nothing to do with the prompt."
READ = "Read both to the end, then go by your impression. Length alone is no merit."
