"""Which judge compares which completions, on which sides: a balanced design drawn from one secret. Pure.

Rows are numbered from 0; a row holds every prompt once, and judges take consecutive cells of consecutive rows. Counted
over rows, with P prompts, S seeds, and A x B pairs of completions of a prompt and seed:

- every S rows each prompt meets each seed once, and within a row the seeds differ in number by at most one;
- every S * max(A, B) rows (A = B) each completion of each cell is used once;
- in each row the treatment is on the left for half of the prompts (P odd: one more or fewer), and for each prompt and
  seed it changes sides from one S rows to the next;
- any run of consecutive cells within a row holds as many left as right, to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, zip_longest
from random import Random


@dataclass(frozen=True)
class Cell:
    """One comparison: indices, not ids."""

    prompt: int
    seed: int
    sample_baseline: int
    sample_treatment: int
    treatment_left: bool


@dataclass(frozen=True)
class Place:
    """One place in a judge's session."""

    cell: Cell | None
    """None: an attention item."""
    treatment_left: bool
    repeats: int | None = None
    """The earlier place (index in the session) whose sides are swapped here."""
    expected: str | None = None
    """Of an attention item: left or right."""


class Design:
    """The cells of all rows.

    Args:
        n_prompts, n_seeds: how many there are.
        n_baseline, n_treatment: completions of each prompt and seed, by arm.
        secret: decides every draw; the same secret gives the same design.
    """

    def __init__(self, n_prompts: int, n_seeds: int, n_baseline: int, n_treatment: int, secret: str) -> None:
        assert min(n_prompts, n_seeds, n_baseline, n_treatment) >= 1
        self.n_prompts, self.n_seeds, self.n_pairs = n_prompts, n_seeds, n_baseline * n_treatment
        self._n_samples = n_baseline, n_treatment
        self._secret = secret

    @property
    def n_distinct(self) -> int:
        """How many cells there are before a pair of completions comes again."""
        return self.n_prompts * self.n_seeds * self.n_pairs

    def cells(self, start: int, n: int) -> list[Cell]:
        """n cells of the endless sequence, from number `start` on."""
        return list(islice(self._from(start), n))

    def _from(self, start: int) -> Iterator[Cell]:
        row, skip = divmod(start, self.n_prompts)
        while True:
            yield from self._row(row)[skip:]
            row, skip = row + 1, 0

    def _row(self, row: int) -> list[Cell]:
        """A row, left and right taking turns, at random otherwise."""
        cells = [self._cell(row, prompt) for prompt in range(self.n_prompts)]
        rng = self._rng("row", row)
        rng.shuffle(cells)
        left = [c for c in cells if c.treatment_left]
        right = [c for c in cells if not c.treatment_left]
        more, fewer = (left, right) if (len(left), rng.random()) > (len(right), 0.5) else (right, left)
        return [c for both in zip_longest(more, fewer) for c in both if c is not None]

    def _cell(self, row: int, prompt: int) -> Cell:
        turn, residue = divmod(row, self.n_seeds)
        seed = self._seed_order[(residue + self._offsets[prompt]) % self.n_seeds]
        baseline, treatment = self._pairs(prompt, seed)[turn % self.n_pairs]
        # where the pairs come round in an even number of turns, the sides would come round with them
        flips = turn + (turn // self.n_pairs if self.n_pairs % 2 == 0 else 0)
        left = bool((flips + self._first_side[residue][prompt]) % 2)
        return Cell(prompt, seed, baseline, treatment, left)

    @cached_property
    def _seed_order(self) -> list[int]:
        return self._permutation(self.n_seeds, "seeds")

    @cached_property
    def _offsets(self) -> list[int]:
        """By how much each prompt is ahead in the order of seeds."""
        return [o % self.n_seeds for o in self._permutation(self.n_prompts, "offsets")]

    @cached_property
    def _first_side(self) -> list[list[int]]:
        """[residue][prompt] 0 or 1, balanced over prompts: the side of the treatment in the first turn."""
        return [
            [place % 2 for place in self._permutation(self.n_prompts + odd, "sides", residue)[: self.n_prompts]]
            for odd in [self.n_prompts % 2]
            for residue in range(self.n_seeds)
        ]

    @cache  # noqa: B019  (a design lives as long as the command)
    def _pairs(self, prompt: int, seed: int) -> list[tuple[int, int]]:
        """Every pair of completions once, in an order that uses each completion before any comes again."""
        a, b = self._n_samples
        baseline = self._permutation(a, "baseline", prompt, seed)
        treatment = self._permutation(b, "treatment", prompt, seed)
        return [(baseline[k], treatment[(k + shift) % b]) for shift in range(b) for k in range(a)]

    def _permutation(self, n: int, *name: object) -> list[int]:
        numbers = list(range(n))
        self._rng(*name).shuffle(numbers)
        return numbers

    def _rng(self, *name: object) -> Random:
        return Random("/".join(map(str, (self._secret, *name))))


def session(cells: list[Cell], n_repeats: int, n_attention: int, rng: Random) -> list[Place]:
    """One judge's places: the cells in random order, some of the first half again in the second half, attention items.

    A repeat comes with the sides swapped, and at least half of the session's first votes lie before it.
    """
    order = rng.sample(cells, len(cells))
    half = (len(order) + 1) // 2
    again = rng.sample(range(half), min(n_repeats, half))
    # what is put into the second half, then shuffled with it
    later: list[Cell | int] = [*order[half:], *again]
    rng.shuffle(later)
    places = [Place(c, c.treatment_left) for c in order[:half]]
    for entry in later:
        if isinstance(entry, int):
            places.append(Place(order[entry], not order[entry].treatment_left, repeats=entry))
        else:
            places.append(Place(entry, entry.treatment_left))
    return _with_attention(places, n_attention, rng)


def _with_attention(places: list[Place], n: int, rng: Random) -> list[Place]:
    """Put n attention items at random places, none of them first; half of them (to one) expect `left`."""
    if not n:
        return places
    at = sorted(rng.sample(range(1, len(places) + 1), min(n, len(places))))
    sides = [("left", "right")[i % 2] for i in range(len(at))]
    rng.shuffle(sides)
    result: list[Place] = []
    moved: list[int] = []  # where each of the old places is now
    for i, place in enumerate(places):
        while at and at[0] == i:
            at.pop(0)
            result.append(Place(None, bool(rng.getrandbits(1)), expected=sides.pop()))
        moved.append(len(result))
        repeats = None if place.repeats is None else moved[place.repeats]
        result.append(Place(place.cell, place.treatment_left, repeats))
    result += [Place(None, bool(rng.getrandbits(1)), expected=sides.pop()) for _ in at]
    return result
