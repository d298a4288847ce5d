"""The connection to a panel's database: SQLite in WAL mode, or any other that SQLAlchemy speaks to."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from replication.errors import UserError, first_line
from replication.judging.schema import panel

CONNECT_SECONDS = 10
OFF, NORMAL, FULL = 0, 1, 2  # what `PRAGMA synchronous` says; off is a test's choice, and stays


class Database:
    """Transactions, one writer at a time where the database is a file.

    The URL is SQLAlchemy's, or the path of an SQLite file, whatever characters it has; one that is only read may lie
    where nothing can be written. Raises UserError where the database is of no known kind, or its driver is missing.
    """

    def __init__(self, url: str | Path, only_reads: bool = False) -> None:
        text = re.sub("^postgres(ql)?://", "postgresql+psycopg://", str(url))
        try:
            parsed = make_url(text) if "://" in text else URL.create("sqlite", database=text)
            is_postgres = parsed.get_backend_name() == "postgresql"
            self.engine = create_engine(
                parsed,
                pool_size=40,  # as many as the page has threads: none is opened and closed in a rush
                max_overflow=0,
                pool_pre_ping=is_postgres,
                connect_args={"connect_timeout": CONNECT_SECONDS} if is_postgres else {},
                hide_parameters=True,  # an error never shows what was to be stored: a completion, the hash of a link
            )
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            head, at, tail = re.sub(r"(?i)([?&]\w*password=)[^&]*", r"\1...", str(url)).rpartition("@")
            shown = f"{head.split('://')[0]}://...@{tail}" if at else tail  # no password
            raise UserError(
                f"--database: {shown} cannot be used ({error}); give a file, or a URL such as "
                "postgresql://user@host/name"
            ) from None
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._writer = threading.Lock()
        if self.is_sqlite:
            _set_up_sqlite(self.engine, only_reads)

    @property
    def name(self) -> str:
        """The file, or the URL with its passwords masked."""
        u = self.engine.url
        masked = u.update_query_dict({key: "..." for key in u.query if "password" in key.lower()})
        return str(u.database) if self.is_sqlite else masked.render_as_string(hide_password=True)

    @property
    def address(self) -> str:
        """The file, or the URL without passwords; the driver finds the user's in PGPASSWORD or ~/.pgpass."""
        if self.is_sqlite:
            return str(Path(self.name).absolute())
        u = self.engine.url
        query = {key: value for key, value in u.query.items() if "password" not in key.lower()}  # sslpassword too
        return URL.create(u.drivername, u.username, None, u.host, u.port, u.database, query).render_as_string()

    def exists(self) -> bool:
        """Whether a panel's tables are there; creates no file. Raises UserError where the server cannot be reached."""
        if self.is_sqlite and not Path(self.engine.url.database or "").is_file():
            return False
        try:
            return inspect(self.engine).has_table(panel.name)
        except (DatabaseError, sqlite3.DatabaseError) as error:
            line = first_line(getattr(error, "orig", error))
            what, remedy = f"cannot be read ({line})", "restore it"
            if isinstance(error, OperationalError):
                what = f"does not answer ({line})"
                remedy = "make room there, make it readable" if self.is_sqlite else "start it"
            raise UserError(f"--database: {self.name} {what}; {remedy}, or name another") from None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view: what others write meanwhile is not seen."""
        connection = self.engine.connect()
        if not self.is_sqlite:
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, durable: bool = True) -> Iterator[Connection]:
        """A transaction that is on the disk when the block ends, or has left nothing.

        One that is not durable does not wait for the disk: a crash of the machine (not of this process) may take it
        back, but not if a later transaction is on the disk. They reach it in their order.
        """
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                if self.engine.dialect.name == "postgresql":  # whatever the server or the role has as its default
                    connection.exec_driver_sql(f"SET LOCAL synchronous_commit = {'on' if durable else 'off'}")
                yield connection
            return
        options = {"immediate": True, "durable": durable}
        # threads queue here, fairly, where SQLite would have them sleep and try again
        with self._writer, self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def _set_up_sqlite(engine: Engine, only_reads: bool) -> None:
    file = Path(engine.url.database or "")

    @event.listens_for(engine, "do_connect")
    def _open(*_: Any) -> sqlite3.Connection | None:
        if only_reads:
            return _connect_to_read(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        return None  # then SQLAlchemy connects

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        if not only_reads:
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 30000"):
                connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        immediate = options.get("immediate")
        if immediate:
            wanted = FULL if options["durable"] else NORMAL
            found = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
            if found not in (wanted, OFF):
                connection.exec_driver_sql(f"PRAGMA synchronous = {wanted}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _connect_to_read(file: Path) -> sqlite3.Connection:
    """A connection to an SQLite file that may lie in a folder, or belong to a user, that lets nothing be written.

    A server's journal is read with the file, which needs its two neighbours; a file without a journal needs none.
    """
    journal = file.with_name(f"{file.name}-wal")
    is_whole = not (journal.exists() and journal.stat().st_size)
    for mode in ("mode=rw", "mode=ro", *(["immutable=1"] if is_whole else [])):
        connection = sqlite3.connect(f"file:{quote(str(file))}?{mode}", uri=True, check_same_thread=False)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            refused = error
    if is_whole:
        raise refused
    raise sqlite3.OperationalError(f"{journal.name} holds votes that can be read only where one may write: copy both")
