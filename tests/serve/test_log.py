"""Where lines of the log go: those that every request writes stay in the file."""

import io
import logging
import logging.handlers
from collections.abc import Iterator

import pytest

from serve.log import log_fields, log_with_serve


@pytest.fixture
def serve_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("ray.serve")
    before = (logger.handlers, logger.level, logger.propagate)
    parents = {name: logging.getLogger(name).parent for name in ("serve", "ft_service")}
    yield logger
    logger.handlers, _, logger.propagate = before
    logger.setLevel(before[1])
    for name, parent in parents.items():
        logging.getLogger(name).parent = parent


def test_a_requests_line_is_in_the_file_alone_and_everything_else_on_standard_error_too(serve_logger):
    errors = io.StringIO()
    file = logging.handlers.MemoryHandler(capacity=10)  # as Ray Serve has one, without the file behind it
    serve_logger.handlers = [logging.StreamHandler(errors), file]
    serve_logger.setLevel(logging.INFO)
    serve_logger.propagate = False
    log_with_serve()
    logger = logging.getLogger("serve.gateway")
    logger.warning("a replica is gone")
    log_fields(logger, {"request": "abc"})
    assert errors.getvalue() == "a replica is gone\n"
    assert [record.getMessage() for record in file.buffer] == ["a replica is gone", "request=abc"]
