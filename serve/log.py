"""Messages go into the log file that Ray Serve keeps for each replica, as JSON where the deployment asks for it."""

import logging
from collections.abc import Mapping

_PACKAGES = ("serve", "ft_service")


def log_with_serve() -> None:
    """From now on our loggers pass their messages to Ray Serve's, with its handlers and level.

    Lines of `log_fields` go into the file alone. Ray would copy those on standard error from process to process up to
    the terminal of the driver, which costs a request more than its line in the file.
    """
    serve_logger = logging.getLogger("ray.serve")
    for package in _PACKAGES:
        logging.getLogger(package).parent = serve_logger
    for handler in serve_logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.addFilter(_has_no_fields)


def _has_no_fields(record: logging.LogRecord) -> bool:
    return not hasattr(record, "ft")


def log_fields(logger: logging.Logger, fields: Mapping[str, object]) -> None:
    """One line with `fields`, for people as text and for machines as the value `ft`."""
    logger.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"ft": dict(fields)})
