"""Votes in memory, for the tests of what is computed from them."""

import numpy as np

from replication.runs.files import write_text
from replication.votes.record import Vote, votes_text

SEEDS = (1, 2, 3, 4, 5, 6)


def write_votes(path, votes):
    """Write the record whole."""
    write_text(path, votes_text(votes))


def vote(n=0, seed=1, prompt=0, judge="a", choice="left", left="both", right="baseline", **more):
    fields = {"kind": "human", "vendor": "", "seconds": 20.0, "repeat_of": "", "suite": "s"} | more
    return Vote(
        f"v{n}", fields["suite"], seed, left, right, prompt, 0, 0, judge, fields["kind"], fields["vendor"], choice, "",
        fields["seconds"], fields["repeat_of"],
    )  # fmt: skip


def record(share=0.8, n_judges=10, seeds=SEEDS, ties=0.2, random_seed=0):
    """Every judge on every prompt, seeds in rotation, sides drawn; half the judges are models."""
    rng = np.random.default_rng(random_seed)
    votes = []
    for judge in range(n_judges):
        for prompt in range(8):
            left, right = ("both", "baseline") if rng.random() < 0.5 else ("baseline", "both")
            wins = "left" if (left == "both") == (rng.random() < share) else "right"
            choice = "tie" if rng.random() < ties else wins
            kind = {"kind": "model", "vendor": "x"} if judge % 2 else {}
            seed = seeds[(judge + prompt) % len(seeds)]
            votes.append(vote(len(votes), seed, prompt, f"j{judge}", choice, left, right, **kind))
    return votes
