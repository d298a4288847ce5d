"""Which scalars are averaged over seeds, and the two pages that open on the experiment's questions.

Everything else (each block, each expert, gains' extremes) stays with the cells' own runs: 128 cells hold some twelve
thousand curves, and the questions need these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from urllib.parse import quote, urlencode

from tensorboard.plugins.custom_scalar import layout_pb2

LOSS = "val/loss_nats"
ENTROPIES = ("entropy/predicted_tokens_nats", "entropy/predictive_nats")
VALIDATION_ENTROPIES = ("val/entropy_predicted_tokens_nats", "val/entropy_predictive_nats")
NORM = "train/grad_norm"
TRAINING_LOSS = "train/loss_nats"
OTHERS = ("val/loss_unsmoothed_nats", "train/loss_unsmoothed_nats", "train/objective")
GAINS = ("gain/mean", "gain/share_at_min", "gain/share_at_max")
BLOCK = re.compile(r"(divergence|scale)/block_(\d+)")
COUNTED = {LOSS: "n_seeds/val", TRAINING_LOSS: "n_seeds/train"}
"""How many seeds are behind the mean; counted where these have values."""


@cache
def is_read(tag: str) -> bool:
    """Whether a tag of a journal may be averaged: which blocks are is known once one line was read."""
    return tag in averaged_tags([]) or BLOCK.fullmatch(tag) is not None


def shown_blocks(seen: Iterable[str]) -> list[int]:
    """The first, the third and the last block that tags tell of, as on the cells' own page; none before the first."""
    last = max((int(match[2]) for tag in seen if (match := BLOCK.fullmatch(tag))), default=None)
    return [] if last is None else sorted({0, min(2, last), last})


def question_tags(blocks: list[int]) -> list[str]:
    """What has a band on the page."""
    divergences = [f"divergence/block_{i:02d}" for i in blocks]
    return [LOSS, TRAINING_LOSS, *VALIDATION_ENTROPIES, *ENTROPIES, NORM, *divergences]


def averaged_tags(blocks: list[int]) -> list[str]:
    """What is averaged: the same in every arm."""
    return [*question_tags(blocks), *OTHERS, *GAINS, *(f"scale/block_{i:02d}" for i in blocks)]


def versus(tag: str, first_arm: str) -> str:
    """Where an arm's paired difference to the first arm is: a name that sorts behind the cells' tags."""
    return f"versus_{first_arm}/{tag}"


def band_tag(tag: str, which: str) -> str:
    """Where a mean's own run holds the low and high end of its band: a margin chart wants both in one run with it."""
    return f"with_band/{tag}/{which}"


def first_page(first_arm: str) -> str:
    """Query and fragment of TensorBoard's Time Series: cells and paired differences, one colour an arm.

    TensorBoard sorts tags by name; what is pinned stands above them, in this order.
    """
    pinned = [LOSS, versus(LOSS, first_arm), TRAINING_LOSS, NORM, VALIDATION_ENTROPIES[0]]
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in pinned], separators=(",", ":"))
    query = {"pinnedCards": cards, "runColorGroup": "regex:^(?:over-seeds/)?(.+?)(?:/|-minus-|$)"}
    query |= {"runFilter": "/seed-|-minus-", "smoothing": "0"}
    return f"?{urlencode(query, quote_via=quote)}#timeseries"


def layout(blocks: list[int], has_bands: bool, first_arm: str) -> layout_pb2.Layout:
    """The custom-scalars page: without bands (one seed so far) of lines, because a margin chart would stay empty."""
    arms = "mean and 95 % t interval over seeds" if has_bands else "one seed"

    def chart(title: str, tag: str) -> layout_pb2.Chart:
        if not has_bands:
            lines = layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$"])
            return layout_pb2.Chart(title=title, multiline=lines)
        low, high = (band_tag(tag, which) for which in ("low", "high"))
        series = layout_pb2.MarginChartContent.Series(value=tag, lower=low, upper=high)
        return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=[series]))

    def both(name: str, tag: str) -> list[layout_pb2.Chart]:
        pair = f"{name}: paired difference to {first_arm}"
        return [chart(f"{name}: {arms}", tag), chart(pair, versus(tag, first_arm))]

    each = layout_pb2.MultilineChartContent(tag=[f"^{re.escape(versus(LOSS, first_arm))}/seed-"])
    of_each = layout_pb2.Chart(title="validation loss, nats: paired difference of each seed", multiline=each)
    categories = {
        "Over seeds: is the loss a tie?": [*both("validation loss, nats", LOSS), *both("training loss", TRAINING_LOSS)],
        f"Over seeds: the loss of each seed, minus that of {first_arm}": [of_each],
        "Over seeds: entropies": [
            *both("entropy of the predicted tokens, nats", ENTROPIES[0]),
            *both("entropy of the predictions, nats", ENTROPIES[1]),
            *both("entropy of the predicted tokens, validation", VALIDATION_ENTROPIES[0]),
            *both("entropy of the predictions, validation", VALIDATION_ENTROPIES[1]),
        ],
        "Over seeds: gradient norm": both("gradient norm", NORM),
        "Over seeds: divergence of the first, third and last block": [
            c for i in blocks for c in both(f"divergence of block {i}", f"divergence/block_{i:02d}")
        ],
    }
    # TensorBoard shows a category's charts from last to first (seen in 2.21)
    shown = [layout_pb2.Category(title=title, chart=charts[::-1]) for title, charts in categories.items()]
    return layout_pb2.Layout(version=0, category=shown)
