"""What the server sent, as columns for a classifier. No label is looked at.

The page is cut into the left text's part, the right one's and the rest, and the heads of its answers make a fourth.
Each part becomes counts of its runs of one to three characters, hashed. Lines that stand on every page equally often
say nothing and are left out of that; but so that no change of their order goes unseen, each pair of lines that follow
one another counts as a whole. Sizes, times and places are columns of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from fetched_pages import Seen
from scipy import sparse
from scipy.stats import rankdata
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import HashingVectorizer

COLUMNS_OF_A_PART = 2**15
SIDE = {
    side: re.compile(rf'<section[^<>]*aria-labelledby="{side}".*?</section>', re.DOTALL) for side in ("left", "right")
}
NUMBERS = (
    "place in the session", "bytes of the page", "bytes of the left part", "bytes of the right part", "left less right",
    "bytes of the rest", "bytes of the heads", "lines of the page", "tags of the page", "first byte", "whole page",
    "first byte of the redirect before", "whole redirect before", "first byte of the vote's answer",
    "whole answer to the vote", "left part's place on the page", "right part's place on the page",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """A page, cut."""

    left: str
    right: str
    rest: str
    heads: str
    places: tuple[int, int]
    """Where the left and the right part begin."""


def cut(seen: Seen) -> Parts:
    """The parts of what was sent with one item."""
    body = seen.page.body
    left, right = (SIDE[side].search(body) for side in ("left", "right"))
    if left is None or right is None:
        raise RuntimeError("the page has no parts named left and right; features.py has to learn the new page")
    rest = body
    for match in sorted((left, right), key=lambda m: -m.start()):
        rest = rest[: match.start()] + rest[match.end() :]
    answers = (seen.page, seen.before, seen.after, *seen.files)
    heads = "\n".join(f"{i} {line}" for i, answer in enumerate(answers) for line in answer.head.split("\n"))
    rest += "".join(f"\n{answer.body}" for answer in answers[1:3])
    return Parts(left.group(), right.group(), rest, heads, (left.start(), right.start()))


def numbers(all_seen: Sequence[Seen], parts: Sequence[Parts]) -> np.ndarray:
    """[item, number] as NUMBERS names them."""
    return np.array(
        [
            (
                seen.position, len(seen.page.body), len(p.left), len(p.right), len(p.left) - len(p.right), len(p.rest),
                len(p.heads), seen.page.body.count("\n"), seen.page.body.count("<"), seen.page.first_byte_seconds,
                seen.page.total_seconds, seen.before.first_byte_seconds, seen.before.total_seconds,
                seen.after.first_byte_seconds, seen.after.total_seconds, *p.places,
            )
            for seen, p in zip(all_seen, parts, strict=True)
        ],
        dtype=float,
    )  # fmt: skip


def as_ranks(values: np.ndarray) -> np.ndarray:
    """Each column's ranks, from -1 to 1."""
    return 2 * (rankdata(values, axis=0) - 0.5) / len(values) - 1


def matrix(parts: Sequence[Parts], ranks: np.ndarray) -> sparse.csr_matrix:
    """[item, column]: all of the parts, and the numbers' ranks."""
    texts = [
        [p.left for p in parts],
        [p.right for p in parts],
        _varying([p.rest for p in parts]),
        _varying([p.heads for p in parts]),
    ]
    count = HashingVectorizer(
        analyzer="char", ngram_range=(1, 3), n_features=COLUMNS_OF_A_PART, alternate_sign=False, lowercase=False
    )
    columns = [_varied(count.transform(part)) for part in texts]
    order = [_order([f"{p.left}\n{p.rest}\n{p.right}" for p in parts]), _order([p.heads for p in parts])]
    return sparse.hstack([*columns, *order, sparse.csr_matrix(ranks)], format="csr", dtype=np.float32)


def _varying(pages: Sequence[str]) -> list[str]:
    """The pages without the lines that all of them have equally often."""
    counts = [Counter(page.split("\n")) for page in pages]
    constant = {line for line, n in counts[0].items() if all(c[line] == n for c in counts)}
    return ["\n".join(line for line in page.split("\n") if line not in constant) for page in pages]


def _order(pages: Sequence[str]) -> sparse.csr_matrix:
    """Pairs of neighbouring lines that stand on some pages and not on others, on more than one."""
    pairs = []
    for page in pages:
        lines = page.split("\n")
        pairs.append(Counter(pairwise(lines)))
    n_pages = Counter(pair for page in pairs for pair in page)
    telling = {pair for pair, n in n_pages.items() if 1 < n < len(pages)}
    hasher = FeatureHasher(n_features=COLUMNS_OF_A_PART, input_type="pair", alternate_sign=False)
    return hasher.transform([(f"{a}\n{b}", n) for (a, b), n in page.items() if (a, b) in telling] for page in pairs)


def _varied(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Without the columns that are the same on all pages."""
    columns = counts.tocsc()
    differs = columns.max(axis=0).toarray() - columns.min(axis=0).toarray() > 1e-9
    return columns[:, np.flatnonzero(differs.ravel())].tocsr()
