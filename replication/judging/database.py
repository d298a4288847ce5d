"""The connection to a panel's database: SQLite in WAL mode, or any other that SQLAlchemy speaks to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from replication.errors import UserError
from replication.judging.schema import metadata


class Database:
    """Transactions, one writer at a time where the database is a file.

    Args:
        url: a SQLAlchemy URL, or the path of an SQLite file.

    Raises:
        UserError: no such kind of database, or its driver is missing.
    """

    def __init__(self, url: str | Path) -> None:
        text = str(url) if "://" in str(url) else f"sqlite:///{url}"
        text = text.replace("postgresql://", "postgresql+psycopg://", 1)
        try:
            self.engine = create_engine(
                text, pool_size=20, max_overflow=20, pool_pre_ping=not text.startswith("sqlite")
            )
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise UserError(
                f"--database: {_without_password(text)} cannot be used ({error}); give a file, or a URL such as "
                "postgresql://user@host/name"
            ) from None
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._writer = threading.Lock()
        if self.is_sqlite:
            Path(self.engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)
            _set_up_sqlite(self.engine)

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def exists(self) -> bool:
        """Whether a panel's tables are there. Never creates an SQLite file.

        Raises:
            UserError: the server cannot be reached.
        """
        if self.is_sqlite and not Path(self.engine.url.database or "").is_file():
            return False
        try:
            return inspect(self.engine).has_table("panel")
        except OperationalError as error:
            line = str(error.orig).strip().splitlines()[0]
            raise UserError(f"--database: {self.name} does not answer ({line}); start it, or name another") from None

    @staticmethod
    def create(connection: Connection) -> None:
        """Create the tables, inside a transaction."""
        metadata.create_all(connection)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, *, lasting: bool = True) -> Iterator[Connection]:
        """A transaction that is on the disk when the block ends, or has left nothing.

        Args:
            lasting: False: a loss of power may take it back, if no lasting one came after it. Saves waiting for a disk.
        """
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                yield connection
            return
        # threads queue here, fairly, where SQLite would have them sleep and try again
        options = {"immediate": True, "synchronous": "FULL" if lasting else "NORMAL"}
        with self._writer, self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def _set_up_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("immediate"):
            connection.exec_driver_sql(f"PRAGMA synchronous = {options['synchronous']}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("immediate") else "BEGIN")


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://...@{tail}" if at else url
