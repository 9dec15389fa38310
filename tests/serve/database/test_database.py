"""The database: tables as the code expects them, keys whose text is never stored, an audit log of what changed."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, text

from ft_service.errors import DatabaseError, UsageError
from serve.database.audit import audit_log
from serve.database.database import open_database
from serve.database.keys import create_key, find_key, list_keys, revoke_key
from serve.database.tables import Base


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "a folder" / "service.db"


@pytest.fixture
def database(file) -> Engine:
    return open_database(f"sqlite:///{file}")


def test_migrations_make_the_tables_that_the_code_expects(database):
    with database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_changes_nothing(file, database):
    key, _ = create_key(database, "ci")
    assert find_key(open_database(f"sqlite:///{file}"), key) is not None


def test_two_gateways_may_open_a_new_database_at_once(file):
    errors = []

    def open_it() -> None:
        try:
            open_database(f"sqlite:///{file}")
        except DatabaseError as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_database_of_a_newer_version_is_refused(file, database):
    with database.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="9999"):
        open_database(f"sqlite:///{file}")


@pytest.mark.parametrize("url", ["nonsense", "mysterydb://host/x", "sqlite:////proc/no/such.db"])
def test_an_unusable_url_is_an_error_that_names_the_variable(url):
    with pytest.raises(DatabaseError, match="FT_DATABASE_URL"):
        open_database(url)


def test_a_password_in_the_url_is_never_shown():
    with pytest.raises(DatabaseError) as error:
        open_database("sqlite+nodriver://user:s3cret@host/x")
    assert "s3cret" not in str(error.value)


def test_a_key_is_found_by_its_text_alone_and_the_text_is_nowhere_in_the_file(file, database):
    key, record = create_key(database, "ci", models=("tiny", "tiny-run-*"), requests_per_minute=60)
    assert find_key(database, key) == record
    assert find_key(database, key[:-1]) is None
    assert find_key(database, "ft-" + "x" * 8 + key[11:]) is None
    database.dispose()
    content = b"".join(part.read_bytes() for part in file.parent.iterdir())
    assert b"ci" in content and key.split("-")[2].encode() not in content


def test_models_of_a_key_are_ids_or_beginnings_of_ids(database):
    _, record = create_key(database, "ci", models=("tiny", "tiny-run-*"))
    assert [record.may_use(model) for model in ("tiny", "tiny-run-1", "tiny-other", "tin")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_revoked_or_expired_key_is_invalid(database):
    now = datetime.now(UTC)
    create_key(database, "old", expires=now - timedelta(days=1))
    create_key(database, "new", expires=now + timedelta(days=1))
    create_key(database, "gone")
    revoke_key(database, "gone")
    assert [key.is_valid(now) for key in list_keys(database)] == [False, True, False]


def test_a_name_is_for_one_key(database):
    create_key(database, "ci")
    with pytest.raises(UsageError, match="a key of this name exists"):
        create_key(database, "ci")
    with pytest.raises(UsageError, match="no key has this name"):
        revoke_key(database, "other")


def test_the_audit_log_has_every_change_and_no_refused_one(database):
    create_key(database, "ci", is_admin=True)
    with pytest.raises(UsageError):
        create_key(database, "ci")
    revoke_key(database, "ci")
    revoke_key(database, "ci")
    entries = [(entry.key, entry.action, entry.target) for entry in audit_log(database)]
    assert entries == [("command line", "keys.create", "ci"), ("command line", "keys.revoke", "ci")]


def test_a_damaged_database_is_an_error_of_ours(file, database):
    database.dispose()
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE api_keys")
    with pytest.raises(DatabaseError, match="api_keys"):
        list_keys(database)
