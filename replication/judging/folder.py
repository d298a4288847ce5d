"""The files of a panel: the judging folder, the sealed key beside it, and the database that panel.json names."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from replication.config import AnalysisConfig, load_suite, to_yaml
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.panel import PanelOptions, Tokens
from replication.judging.schema import metadata
from replication.judging.store import PanelFacts, Store
from replication.protocol.preregistration import read_plan
from replication.runs.files import write_text
from replication.runs.layout import SuiteDir
from replication.runs.records import read_record, write_record
from replication.votes.record import SCHEMA_VERSION, PanelRecord, read_panel_record

DATABASE_FILE = "judging.sqlite"


@dataclass(frozen=True)
class Serving:
    """serving.json: where the page is served, while it is."""

    address: str  # as this machine reaches it
    links: str  # as judges do
    host: str  # this machine's name


class PanelFolder:
    """The files of one panel.

    The root, of votes.csv, votes.json and, if there is one, the suite, is the output folder; or the judging folder
    itself, of panel.json, tokens and the SQLite file, where that was brought to another machine alone.
    """

    def __init__(self, root: Path, judging: Path) -> None:
        self.root, self.judging, self.suite = root, judging, SuiteDir(root)
        self.sealed = self.suite.sealed
        self.admin_token = judging / "admin-token"
        self.join_token = judging / "join-token"
        self.database_file = judging / DATABASE_FILE
        self.marginals = judging / "marginals.json"
        self._panel_record = judging / "panel.json"
        self._serving = judging / "serving.json"

    def open(self, url: str | None = None, only_reads: bool = False) -> Database:
        """The panel's database: the one at `url`, or that panel.json names, or else the SQLite file."""
        facts = read_panel_record(self.judging)
        named = url or facts.database
        database = Database(named or self.database_file, only_reads)
        if not database.exists():
            hint = "" if url or named else ", or name its --database"
            raise UserError(f"{database.name}: no panel there; `replicate judge prepare {self.root}` makes one{hint}")
        if not only_reads:
            metadata.create_all(database.engine)  # tables that a panel of an earlier version lacks
        if not url and facts.panel_id and (there := Store(database).panel().panel_id) != facts.panel_id:
            raise UserError(
                f"{self._panel_record}: is of the panel {facts.panel_id}, and {database.name} holds {there}; bring "
                "each panel's folder back whole, or name the --database that is meant"
            )
        return database

    def rules(self, about: PanelFacts) -> AnalysisConfig:
        """The suite's analysis section, with the judges and the votes of each that the panel is to come to.

        The registered plan says how many judges, people and models together; the panel how many votes each was given.
        Where the suite is not here the section has its defaults, and the panel says both.
        """
        rules, n_judges = AnalysisConfig(), about.planned_judges
        if self.suite.suite.is_file():
            suite = load_suite(self.suite.suite)
            rules = suite.analysis.resolved(suite.arms)
            record = read_plan(self.suite)
            n_judges = record.plan.analysis.judges if record else n_judges
        return replace(rules, judges=n_judges, votes_per_judge=about.votes_per_judge)

    def keep_tokens(self, tokens: Tokens) -> None:
        """Write the two tokens, of which the database has hashes alone, in files that their owner alone can read."""
        for path, token in ((self.admin_token, tokens.admin), (self.join_token, tokens.join)):
            if token is None:
                path.unlink(missing_ok=True)
                continue
            write_text(path, "")
            os.chmod(path, 0o600)
            path.write_text(token + "\n", encoding="utf-8")  # the file keeps its mode

    def read_join_token(self) -> str | None:
        with suppress(OSError):
            return self.join_token.read_text(encoding="utf-8", errors="replace").strip() or None
        return None

    def write_facts(self, database: Database, options: PanelOptions, is_named: bool, setting: str = "") -> None:
        """Write panel.json and study.yaml; is_named: the database is not the SQLite file here; setting: see Chosen."""
        about = Store(database).panel()
        record = PanelRecord(
            panel_id=about.panel_id,
            suite=about.suite,
            key_sha256=about.key_sha256,
            **{key: value for key, value in vars(options).items() if key != "study"},
            database=database.address if is_named else None,
            setting=setting or None,
            study_sha256=options.study.sha256,
            schema_version=SCHEMA_VERSION,
        )
        write_text(self.judging / "study.yaml", to_yaml(options.study))
        write_record(self._panel_record, record)

    def note_serving(self, address: str, links: str) -> None:
        """Write down where the page is served from here, for those who make links; not being able to is no fault."""
        with suppress(OSError):
            write_record(self._serving, Serving(address, links, socket.gethostname()))

    def forget_serving(self, address: str) -> None:
        with suppress(OSError, UserError):
            found = read_record(self._serving, Serving)
            if found is not None and found.address == address:
                self._serving.unlink()

    def served_at(self) -> str | None:
        """The address at which judges reach the page, if it is being served from this machine."""
        with suppress(OSError, ValueError):
            found = read_record(self._serving, Serving)
            if found is None or found.host != socket.gethostname():
                return None
            parts = urlsplit(found.address)
            for name in (parts.hostname, "127.0.0.1"):
                with suppress(OSError), socket.create_connection((name, parts.port), timeout=2):
                    return found.links
        return None


def find_panel(folder: Path) -> PanelFolder:
    """The panel of an output folder, or of a judging folder alone. Raises UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output folder of `replicate grid run`")
    judging = SuiteDir(folder).judging
    alone = (folder / "panel.json").is_file() or (folder / DATABASE_FILE).is_file()
    if alone and not judging.is_dir():
        whole = folder.absolute().parent
        is_at_home = SuiteDir(whole).judging == folder.absolute() and SuiteDir(whole).sealed.is_dir()
        return PanelFolder(whole if is_at_home else folder, folder)
    return PanelFolder(folder, judging)
