"""A panel of a few items, made the way every panel is made, and what a test needs to know of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from replication.config.study import Study, load_study
from replication.generation.completions import Completion
from replication.judging.database import Database
from replication.judging.page.server import create_app, http_server, listen
from replication.judging.panel import PanelOptions, create_panel, invite, lock_panel
from replication.judging.schema import metadata
from replication.judging.store import Store

SUITE = "suite-under-test"
ARMS = ("baseline", "both")


@dataclass(frozen=True)
class SmallPanel:
    database: Database
    store: Store
    sealed: Path
    admin: str
    """The administrator's token."""
    join: str
    """The token of the open link; two more sets than invited judges are free."""
    links: tuple[str, str]
    """Tokens of judge-001 and judge-002."""

    def lock(self) -> None:
        lock_panel(self.database, self.sealed, "a test")

    def contents(self) -> dict[str, list[Any]]:
        """Every row of every table."""
        with self.database.read() as c:
            return {table.name: c.execute(select(table)).all() for table in metadata.sorted_tables}


def completion(prompt: int, seed: int, arm: str, sample: int) -> str:
    return f"Text {prompt}.{seed}.{sample} goes on from the prompt. It has {len(arm)} words that matter."


def small_panel(
    folder: Path,
    *,
    n_prompts: int = 3,
    votes: int = 6,
    repeat_share: float = 0.0,
    attention: int = 0,
    survey: bool = False,
    text: Callable[[int, int, str, int], str] = completion,
    study: Study | None = None,
) -> SmallPanel:
    """Two seeds, two samples; four sets of which two are given to invited judges.

    Args:
        text: (prompt, seed, arm, sample) -> completion.
    """
    completions = {
        seed: {
            arm: [
                Completion(
                    arm, seed, prompt, "plain", f"What comes after {prompt}?", sample, text(prompt, seed, arm, sample)
                )
                for prompt in range(n_prompts)
                for sample in range(2)
            ]
            for arm in ARMS
        }
        for seed in (1, 2)
    }
    database = Database(folder / "judging.sqlite")
    options = PanelOptions(4, votes, repeat_share, attention, survey, study=study or load_study())
    tokens = create_panel(database, folder / "sealed", SUITE, completions, ARMS, options)
    links = invite(database, ["judge-001", "judge-002"])
    assert tokens.join is not None
    return SmallPanel(
        database,
        Store(database),
        folder / "sealed",
        tokens.admin,
        tokens.join,
        (links["judge-001"], links["judge-002"]),
    )


def begin(panel: SmallPanel) -> dict[str, str]:
    """Both judges start and vote once; token -> what is shown to them now."""
    shown = {}
    for token, name in zip(panel.links, ("judge-001", "judge-002"), strict=True):
        panel.store.start(name)
        first = panel.store.show(name)
        assert first is not None
        panel.store.vote(name, first.impression, "tie")
        second = panel.store.show(name)
        assert second is not None
        shown[token] = second.impression
    return shown


@contextmanager
def served(store: Store, **options: Any) -> Iterator[str]:
    """The page at an address of this machine, in a thread."""
    listening = listen("127.0.0.1", 0)
    server = http_server(create_app(store, **options))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
