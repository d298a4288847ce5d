"""Which judge compares which completions, on which sides: a balanced design drawn from one secret. Pure.

Rows are numbered from 0; a row holds every prompt once, and judges are dealt the cells row by row. Counted over rows,
 with P prompts, S seeds, and A x B pairs of completions of a prompt and seed:

- every S rows each prompt meets each seed once, and within a row the seeds differ in number by at most one;
- every S * max(A, B) rows (A = B) each completion of each cell is used once;
- in each row the treatment is on the left for half of the prompts (P odd: one more or fewer);
- from one S rows to the next each prompt and seed changes sides, until all A x B pairs have been used; when these come
  round, each comes with its sides swapped (which, for an even A x B, leaves out one change).

So a set that is a whole row is half left, to one. A part of a row is so on average alone, and must be: which cells lie
in a part, and in which order, is drawn without a look at the sides. Were every part half left, each judge's set would
be one linear equation in the unknown "which arm is first" of its items, and enough judges' sets would solve for the
sealed key from the assignments alone. A row is one such equation, but its items are in no other row until all pairs
have been used, and then the same items, sides swapped, give the same equation. A repeat within a session gives none: an
item's two sides cancel. That a prompt and seed changes sides ties its items to each other; so do their texts, of which
each completion is in several.

With more than two arms, and so K pairs of arms, S rows are followed by S others K times until each prompt and seed has
met each pair of arms once; what stands above of a prompt and seed then holds of each of its pairs of arms, and in each
row every pair of arms has its second arm on the left for half of its prompts, to one. In which order a prompt and seed
meets the pairs is drawn for it alone: exchanging arms at one prompt and seed gives assignments that are as likely, so
what is compared there says nothing of which texts elsewhere are by the same arm, and only the sides give equations, the
same in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, count, islice, product
from random import Random


@dataclass(frozen=True)
class Cell:
    """One comparison: indices, not ids. Its baseline and treatment are the first and the second of its two arms."""

    prompt: int
    seed: int
    sample_baseline: int
    sample_treatment: int
    treatment_left: bool
    arms: tuple[int, int] = (0, 1)

    @property
    def pair(self) -> tuple[int, ...]:
        """What is compared, whatever the sides."""
        return self.prompt, self.seed, self.sample_baseline, self.sample_treatment, *self.arms


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
        n_arms: how many arms are compared, each with each; more than two have as many completions each.
    """

    def __init__(
        self, n_prompts: int, n_seeds: int, n_baseline: int, n_treatment: int, secret: str, n_arms: int = 2
    ) -> None:
        assert min(n_prompts, n_seeds, n_baseline, n_treatment) >= 1
        assert n_arms == 2 or n_baseline == n_treatment
        self._arms = list(combinations(range(n_arms), 2))
        self.n_prompts, self.n_seeds, self.n_pairs = n_prompts, n_seeds, n_baseline * n_treatment
        self._n_samples = n_baseline, n_treatment
        self._secret = secret

    @property
    def n_distinct(self) -> int:
        """How many cells there are before a pair of completions comes again."""
        return self.n_prompts * self.n_seeds * self.n_pairs * len(self._arms)

    def cells(self, start: int, n: int) -> list[Cell]:
        """n cells of the endless sequence, from number `start` on."""
        row, skip = divmod(start, self.n_prompts)
        return list(islice(self._rows(row), skip, skip + n))

    def deal(self, sizes: Iterable[int]) -> Iterator[list[Cell]]:
        """The cells of one judge after another, from the start of the sequence; no judge gets a pair twice.

        Where a pair comes round while a judge still draws, it waits for the next judge, so that none is left out.

        Args:
            sizes: cells of each judge, at most n_distinct.
        """
        waiting: list[Cell] = []
        rest = self._rows(0)
        for size in sizes:
            assert size <= self.n_distinct
            hand: dict[tuple[int, ...], Cell] = {}
            passed: list[Cell] = []
            while len(hand) < size:
                cell = waiting.pop(0) if waiting else next(rest)
                if cell.pair in hand:
                    passed.append(cell)
                else:
                    hand[cell.pair] = cell
            waiting = passed + waiting
            yield list(hand.values())

    def _rows(self, first: int) -> Iterator[Cell]:
        for row in count(first):
            yield from self._row(row)

    def _row(self, row: int) -> list[Cell]:
        """A row, in an order that knows nothing of the sides."""
        cells = [self._cell(row, prompt) for prompt in range(self.n_prompts)]
        self._rng("row", row).shuffle(cells)
        return cells

    def _cell(self, row: int, prompt: int) -> Cell:
        turn, residue = divmod(row, self.n_seeds)
        turn, step = divmod(turn, len(self._arms))
        seed = self._seed(residue, prompt)
        arms = self._order(prompt, seed)[step]
        baseline, treatment = self._pairs(prompt, seed, arms)[turn % self.n_pairs]
        # where the pairs come round in an even number of turns, the sides would come round with them
        flips = turn + (turn // self.n_pairs if self.n_pairs % 2 == 0 else 0)
        left = bool((flips + self._first_side[residue * len(self._arms) + step][prompt]) % 2)
        return Cell(prompt, seed, baseline, treatment, left, self._arms[arms])

    def _seed(self, residue: int, prompt: int) -> int:
        return self._seed_order[(residue + self._offsets[prompt]) % self.n_seeds]

    @cache  # noqa: B019  (a design lives as long as the command)
    def _order(self, prompt: int, seed: int) -> list[int]:
        """The pairs of arms, as a prompt and seed meets them."""
        return self._permutation(len(self._arms), "arms", prompt, seed)

    @cached_property
    def _seed_order(self) -> list[int]:
        return self._permutation(self.n_seeds, "seeds")

    @cached_property
    def _offsets(self) -> list[int]:
        """By how much each prompt is ahead in the order of seeds."""
        return [o % self.n_seeds for o in self._permutation(self.n_prompts, "offsets")]

    @cached_property
    def _first_side(self) -> list[list[int]]:
        """[residue and step][prompt] 0 or 1, the side of the treatment in the first turn: balanced over prompts that
        meet the same pair of arms there."""
        n_steps, sides = len(self._arms), list[list[int]]()
        for residue, step in product(range(self.n_seeds), range(n_steps)):
            met = [self._order(prompt, self._seed(residue, prompt))[step] for prompt in range(self.n_prompts)]
            of_prompt = dict[int, int]()
            for arms in range(n_steps):
                own = [prompt for prompt, there in enumerate(met) if there == arms]
                name = ("sides", residue, step, arms) if n_steps > 1 else ("sides", residue)
                places = self._permutation(len(own) + len(own) % 2, *name)
                of_prompt |= zip(own, (place % 2 for place in places), strict=False)
            sides.append([of_prompt[prompt] for prompt in range(self.n_prompts)])
        return sides

    @cache  # noqa: B019  (a design lives as long as the command)
    def _pairs(self, prompt: int, seed: int, arms: int) -> list[tuple[int, int]]:
        """Every pair of completions once, in an order that uses each completion before any comes again."""
        a, b = self._n_samples
        name = (prompt, seed, arms) if len(self._arms) > 1 else (prompt, seed)
        baseline = self._permutation(a, "baseline", *name)
        treatment = self._permutation(b, "treatment", *name)
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
