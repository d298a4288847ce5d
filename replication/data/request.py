"""What a preparation depends on: the part of DataConfig that two preparations must share to be the same."""

from __future__ import annotations

from typing import Any

from replication.config import DataConfig, differences, flatten, to_dict


def request_of(data: DataConfig) -> dict[str, Any]:
    """DataConfig as plain values, without what changes no token.

    That is the folder, the processes, and the weights too where no token budget is shared by them.
    """
    request = to_dict(data)
    for key in ("dir", "num_proc"):
        del request[key]
    if data.token_budget is None:
        for source in request["sources"]:
            del source["weight"]
    return request


def request_differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Config keys in which two requests differ, such as `data.sources.web.path` or `data.tokenizer.vocab_size`."""
    return [f"data.{key}" for key in differences(_by_name(a), _by_name(b))]


def changed_sources(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Sources in which two requests differ where the tokens of all others are the same in both; else none.

    A tokenizer that is trained here depends on the text of every source, and every share on each weight.
    """
    trained = a["token_budget"] is None or a["tokenizer"]["path"] is None
    if trained or _shared(a) != _shared(b):
        return []
    return [s["name"] for s, t in zip(a["sources"], b["sources"], strict=True) if s != t]


def _shared(request: dict[str, Any]) -> dict[str, Any]:
    """What the tokens of every source depend on."""
    return {**request, "sources": [(source["name"], source["weight"]) for source in request["sources"]]}


def _by_name(request: dict[str, Any]) -> dict[str, Any]:
    sources = {source["name"]: source for source in request.get("sources", [])}
    # The place of a source is part of the request: source numbers key the data order.
    return flatten({**request, "sources": {name: {**s, "place": i} for i, (name, s) in enumerate(sources.items())}})
