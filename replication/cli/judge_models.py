"""`replicate judge model` and `judge sheet`: models as judges, behind an endpoint or by hand."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, number, takes, whole
from replication.cli.judge import DATABASE, DIR, KEY, open_panel
from replication.console import say
from replication.judging.models.settings import DEFAULT_KEY, ModelSettings

VENDOR = takes("--vendor", "who makes the model; needed when the judge is new", metavar="V")
VOTES = takes("--votes", "pairs of a new judge (default: as many as a person's)", COUNT, metavar="N")


def _temperature(text: str) -> float | None:
    return None if text.lower() == "none" else number("[0, 2]")(text)


@DIR
@takes("--model", "the model, as the endpoint knows it", required=True, metavar="NAME")
@takes("--base-url", "an OpenAI-compatible endpoint, up to and with its /v1", required=True, metavar="URL")
@VENDOR
@takes("--judge-id", "(default: the model's name, without what stands before its last /)", metavar="ID")
@VOTES
@takes("--api-key-env", f"variable with the key (default {DEFAULT_KEY})", default=DEFAULT_KEY, metavar="NAME")
@takes("--parallel", "requests in flight at once (default 4)", COUNT, ModelSettings.parallel, metavar="N")
@takes("--requests-per-minute", "pace, further tries included (default: no limit)", POSITIVE, metavar="N")
@takes("--max-requests", "of this run, further tries included (default: no limit)", COUNT, metavar="N")
@takes("--max-tokens", "of this run, both ways (default: no limit)", whole(1, 2**53), metavar="N")
@takes("--timeout-seconds", "of one try (default 60)", POSITIVE, ModelSettings.timeout_seconds, metavar="S")
@takes("--retries", "further tries of a request (default 8)", NATURAL, ModelSettings.retries, metavar="N")
@takes(
    "--max-answer-tokens",
    "length of an answer; a model that thinks first needs thousands (default 16)",
    COUNT,
    ModelSettings.max_answer_tokens,
    metavar="N",
)
@takes("--temperature", "none: the endpoint's own (default 0)", _temperature, ModelSettings.temperature, metavar="T")
@takes(
    "--price", "of a million tokens in, and out: tells the cost", number("[0, inf)"), (), nargs=2, metavar=("IN", "OUT")
)
@KEY
@DATABASE
def model(args: Namespace) -> int:
    """Let a model behind an OpenAI-compatible endpoint judge.

    Returns:
        0 where every comparison has its answer, else 1.
    """
    from replication.judging.models.answers import join_panel
    from replication.judging.models.run import run_model_judge

    names = {field.name for field in fields(ModelSettings)}
    settings = ModelSettings(**{name: value for name, value in vars(args).items() if name in names})
    settings.check()
    folder, database = open_panel(args)
    judge_id = args.judge_id or re.sub(r"[^\w.@-]", "-", args.model.rstrip("/").rpartition("/")[2])
    join = join_panel(database, folder.sealed, judge_id, args.vendor, args.votes)
    return run_model_judge(database, judge_id, settings, Console(highlight=False, soft_wrap=True), join).exit_code


@DIR
@takes("--judge-id", "the judge; a new one gets its pairs", required=True, metavar="ID")
@VENDOR
@takes("--model", "what the chat window calls the model (default: the judge's id)", default="", metavar="NAME")
@VOTES
@takes("--items-per-part", "comparisons that are pasted at once (default 8)", COUNT, metavar="N")
@takes("--out", "write the sheet: what is not answered yet", Path, metavar="FILE", either=True)
@takes("--read", "read the pasted answers of whole parts", Path, metavar="FILE", either=True)
@KEY
@DATABASE
def sheet(args: Namespace) -> None:
    """Let a chat model judge by hand: write a sheet of questions, read the filled one."""
    from replication.judging.models.answers import join_panel, print_summary
    from replication.judging.models.sheets import check_target, read_sheet, write_sheet

    console = Console(highlight=False, soft_wrap=True)
    folder, database = open_panel(args)
    if args.read is not None:
        print_summary(read_sheet(database, args.judge_id, args.read), console)
        return
    check_target(database, args.judge_id, args.out)
    join = join_panel(database, folder.sealed, args.judge_id, args.vendor, args.votes)
    if join is not None:
        join()
    n = write_sheet(database, args.judge_id, args.out, args.items_per_part or 0, args.model)
    say(console, f"{args.out}: {n} parts, each for a new chat; its first lines say how")
