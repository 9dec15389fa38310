"""Opens the database and brings its tables up to date.

`FT_DATABASE_URL` is a SQLAlchemy URL: ``sqlite:////var/lib/ft/service.db`` for one gateway, on a local disk and never
on NFS or object storage; ``postgresql+pg8000://user:password@host/name`` for several.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from ft_service.errors import DatabaseError
from ft_service.text import first_line

MIGRATIONS = Path(__file__).with_name("migrations")
_BUSY_MILLISECONDS = 10_000
_UPGRADE_LOCK = 0x66745F73
"""Of Postgres' advisory locks: two gateways that start at once must not both upgrade."""
_NAMED_LOCKS = 0x66745F6C
"""Of Postgres' advisory locks with two numbers: those of `lock_name`."""


def open_database(url: str) -> Engine:
    """The engine of a database with today's tables. Thread-safe.

    Raises `DatabaseError` when the URL is wrong, the database is away, or a newer version of ft_service upgraded it.
    """
    try:
        shown = make_url(url).render_as_string(hide_password=True)
        engine = create_engine(url, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise DatabaseError(
            f"FT_DATABASE_URL: is no usable SQLAlchemy URL ({first_line(error)}). Write sqlite:////folder/service.db, "
            "or postgresql+pg8000://user:password@host/name (needs: pip install pg8000)."
        ) from None
    if engine.dialect.name == "sqlite":
        _make_folder(engine)
        event.listen(engine, "connect", _prepare_sqlite)
    try:
        _upgrade(engine)
    except (SQLAlchemyError, CommandError) as error:
        raise DatabaseError(f"FT_DATABASE_URL = {shown}: cannot be used ({first_line(error)}).") from None
    return engine


@contextmanager
def session(engine: Engine) -> Iterator[Session]:
    """A session whose changes are kept by its `commit`. Raises `DatabaseError` when the database fails."""
    try:
        with Session(engine) as opened:
            yield opened
    except SQLAlchemyError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise DatabaseError(f"FT_DATABASE_URL = {shown}: the database failed ({first_line(error)}).") from None


def lock_name(opened: Session, name: str) -> None:
    """Let one transaction at a time hold a name, in all processes: what it reads next stays true until it commits.

    Call it before anything else in the session. SQLite has one writer at a time, whatever the name.
    """
    connection = opened.connection()
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        number = zlib.crc32(name.encode()) - 2**31
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_NAMED_LOCKS}, {number})")


def _make_folder(engine: Engine) -> None:
    if engine.url.database and engine.url.database != ":memory:":
        folder = Path(engine.url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"FT_DATABASE_URL: its folder {folder} cannot be made ({error.strerror}).") from None


def _prepare_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
    cursor.execute("PRAGMA synchronous=FULL")  # what was committed survives a power cut
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA secure_delete=ON")  # a rater who asks for deletion leaves nothing in free pages
    cursor.close()


def _upgrade(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.connect() as connection:
        _lock(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})")
