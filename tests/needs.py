"""What a test needs of its machine: skipped on a person's that lacks it, a failure in CI, which installs it."""

import os

import pytest

LIBAIO = "offload: nvme needs libaio (Debian's libaio-dev)"


def needs(is_there: bool, what: str) -> None:
    """End the test here unless what it needs `is_there`."""
    if is_there:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI's machine should have this: {what}", pytrace=False)
    pytest.skip(what)


def can_offload_to_nvme() -> bool:
    """Whether DeepSpeed's operator for asynchronous files can be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())
