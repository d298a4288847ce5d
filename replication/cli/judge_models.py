"""`replicate judge model` and `judge sheet`: models as judges, behind an endpoint or by hand."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, Parser, number, whole
from replication.console import say


def model_arguments(sub: Parser) -> None:
    from replication.judging.models.settings import DEFAULT_KEY, ModelSettings

    d = {field.name: field.default for field in fields(ModelSettings)}
    add = sub.add_argument
    add("--model", required=True, metavar="NAME", help="the model, as the endpoint knows it")
    add("--base-url", required=True, metavar="URL", help="an OpenAI-compatible endpoint, up to and with its /v1")
    add("--vendor", metavar="V", help="who makes the model; needed when the judge is new")
    add("--judge-id", metavar="ID", help="(default: the model's name, without what stands before its last /)")
    add("--votes", type=COUNT, metavar="N", help="pairs of a new judge (default: as many as a person's)")
    add("--api-key-env", default=DEFAULT_KEY, metavar="NAME", help=f"variable with the key (default {DEFAULT_KEY})")
    add("--parallel", type=COUNT, default=d["parallel"], metavar="N", help="requests in flight at once (default 4)")
    add("--requests-per-minute", type=POSITIVE, metavar="N", help="pace, further tries included (default: no limit)")
    add("--max-requests", type=COUNT, metavar="N", help="of this run, further tries included (default: no limit)")
    add("--max-tokens", type=whole(1, 2**53), metavar="N", help="of this run, both ways (default: no limit)")
    add("--timeout-seconds", type=POSITIVE, default=d["timeout_seconds"], metavar="S", help="of one try (default 60)")
    add("--retries", type=NATURAL, default=d["retries"], metavar="N", help="further tries of a request (default 8)")
    add("--max-answer-tokens", type=COUNT, default=d["max_answer_tokens"], metavar="N", help="length of an answer; a "
        "model that thinks first needs thousands (default 16)")  # fmt: skip
    add("--temperature", type=_temperature, default=d["temperature"], metavar="T", help="none: the endpoint's own "
        "(default 0)")  # fmt: skip


def _temperature(text: str) -> float | None:
    return None if text.lower() == "none" else number("[0, 2]")(text)


def ask_model(args: argparse.Namespace, console: Console) -> int:
    """0 where every comparison has its answer, else 1."""
    from replication.judging.folder import find_panel
    from replication.judging.models.answers import join_panel
    from replication.judging.models.run import run_model_judge
    from replication.judging.models.settings import ModelSettings

    names = {field.name for field in fields(ModelSettings)}
    settings = ModelSettings(**{name: value for name, value in vars(args).items() if name in names})
    settings.check()
    folder = find_panel(args.dir)
    database = folder.open(args.database)
    judge_id = args.judge_id or default_judge_id(args.model)
    join = join_panel(database, folder.sealed, judge_id, args.vendor, args.votes)
    return run_model_judge(database, judge_id, settings, console, join).exit_code


def default_judge_id(model: str) -> str:
    """The model's name without what stands before its last /, such as `llama3-8b` for `lab/llama3:8b`."""
    return re.sub(r"[^\w.@-]", "-", model.rstrip("/").rpartition("/")[2])


def sheet_arguments(sub: Parser) -> None:
    add = sub.add_argument
    add("--judge-id", required=True, metavar="ID", help="the judge; a new one gets its pairs")
    add("--vendor", metavar="V", help="who makes the model; needed when the judge is new")
    add("--model", default="", metavar="NAME", help="what the chat window calls the model (default: the judge's id)")
    add("--votes", type=COUNT, metavar="N", help="pairs of a new judge (default: as many as a person's)")
    add("--items-per-part", type=COUNT, metavar="N", help="comparisons that are pasted at once (default 8)")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="write the sheet: what is not answered yet")
    what.add_argument("--read", type=Path, metavar="FILE", help="read the pasted answers of whole parts")


def read_or_write_sheet(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.folder import find_panel
    from replication.judging.models.answers import join_panel, print_summary
    from replication.judging.models.sheets import check_target, read_sheet, write_sheet

    folder = find_panel(args.dir)
    database = folder.open(args.database)
    if args.read is not None:
        print_summary(read_sheet(database, args.judge_id, args.read), console)
        return 0
    check_target(database, args.judge_id, args.out)
    join = join_panel(database, folder.sealed, args.judge_id, args.vendor, args.votes)
    if join is not None:
        join()
    n = write_sheet(database, args.judge_id, args.out, args.items_per_part or 0, args.model)
    say(console, f"{args.out}: {n} parts, each for a new chat; its first lines say how")
    return 0
