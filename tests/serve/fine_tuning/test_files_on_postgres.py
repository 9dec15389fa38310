"""Files on Debian's Postgres: the tests of SQLite again, where transactions matter."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.fine_tuning.file_world import FileServer, file_server
from tests.serve.fine_tuning.test_files import (
    base,
    client,
    test_a_cancelled_or_expired_upload_leaves_nothing,
    test_a_content_lies_on_storage_once_and_goes_with_its_last_file,
    test_a_file_in_parts_is_the_same_file,
    test_a_key_has_a_quota_of_bytes_and_deleting_gives_it_back,
    test_a_key_sees_its_own_files_and_those_of_its_organisation,
    test_a_quota_holds_for_all_gateways_together,
    test_an_expired_file_is_gone_at_once_and_its_content_at_the_next_tidying,
    test_interrupted_processes_leave_nothing_for_long_and_their_checks_are_done,
    test_pages_go_through_all_files_even_if_each_is_deleted_meanwhile,
    test_sixty_four_writers_at_once_lose_nothing,
    test_the_same_completion_twice_at_once_makes_one_file,
    test_wrong_parameters_of_a_list_are_refused_by_name,
)
from tests.serve.postgres import postgres

pytestmark = pytest.mark.multiprocess  # the database's

__all__ = [
    "base",
    "client",
    "test_a_cancelled_or_expired_upload_leaves_nothing",
    "test_a_content_lies_on_storage_once_and_goes_with_its_last_file",
    "test_a_file_in_parts_is_the_same_file",
    "test_a_key_has_a_quota_of_bytes_and_deleting_gives_it_back",
    "test_a_key_sees_its_own_files_and_those_of_its_organisation",
    "test_a_quota_holds_for_all_gateways_together",
    "test_an_expired_file_is_gone_at_once_and_its_content_at_the_next_tidying",
    "test_interrupted_processes_leave_nothing_for_long_and_their_checks_are_done",
    "test_pages_go_through_all_files_even_if_each_is_deleted_meanwhile",
    "test_sixty_four_writers_at_once_lose_nothing",
    "test_the_same_completion_twice_at_once_makes_one_file",
    "test_wrong_parameters_of_a_list_are_refused_by_name",
]


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    with postgres() as found:
        database = found.new_database(uuid.uuid4().hex)
        with file_server(base, tmp_path_factory.mktemp("server"), database) as running:
            yield running
