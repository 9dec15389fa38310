"""Messages go into the log file that Ray Serve keeps for each replica, as JSON where the deployment asks for it."""

import logging
from collections.abc import Mapping

_PACKAGES = ("serve", "ft_service")


def log_with_serve() -> None:
    """From now on our loggers pass their messages to Ray Serve's, with its handlers and level."""
    for package in _PACKAGES:
        logging.getLogger(package).parent = logging.getLogger("ray.serve")


def log_fields(logger: logging.Logger, fields: Mapping[str, object]) -> None:
    """One line with `fields`, for people as text and for machines as the value `ft`."""
    logger.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"ft": dict(fields)})
