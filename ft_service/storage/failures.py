"""What the error of a folder or an object store means: whether it may pass, in which words, and its cure."""

import errno
import re

from obstore.exceptions import BaseError

from ft_service.errors import StorageError, UnreachableError

STORE_ERRORS = (OSError, BaseError)
"""What a call to a file system or to an object store raises."""

# No such file, no permission, no space, or no such operation.
_PERMANENT = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.ENOSYS,
}

_STATUS = re.compile(r"status code: (\d{3})([ \w]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_NO_CREDENTIALS = re.compile(r"169\.254\.|metadata\.google|[Cc]redentials? (?:file|not)|IDENTITY_HEADER|/oauth2?/")
_ASK_AGAIN = (408, 429)
"""The 4xx that ask for a retry."""
_NOT_IMPLEMENTED = 501

_RENEW = "Renew the credentials of this process; docs/storage.md lists where they are looked for."
_ALLOW = "Allow these credentials to read, write, list and delete there (docs/storage.md)."
_CURES = {
    "ExpiredToken": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidToken": _RENEW,
    "InvalidAccessKeyId": _RENEW,
    "SignatureDoesNotMatch": _RENEW,
    "AuthenticationFailed": _RENEW,
    "InvalidAuthenticationInfo": _RENEW,
    "RequestTimeTooSkewed": "Set the clock of this machine.",
    "NoSuchBucket": "Create the bucket, or correct its name.",
    "ContainerNotFound": "Create the container, or correct its name.",
    "AccessDenied": _ALLOW,
}
"""By the error code of a store's answer."""
_CURES_BY_STATUS = {
    400: "The credentials may have expired. " + _RENEW,  # S3's answers to HEAD have no code
    401: _RENEW,
    403: _ALLOW,
}


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later. Everything that is not clearly permanent may."""
    if not isinstance(error, STORE_ERRORS):
        return False
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    status = http_status(error)
    if status is not None:
        return status in _ASK_AGAIN or (status >= 500 and status != _NOT_IMPLEMENTED)
    if isinstance(error, BaseError):
        return "Generic" in type(error).__name__
    # An error about a whole folder (shutil.Error) has the error numbers of its files only in its text.
    numbers = [error.errno] if error.errno else [int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))]
    return not _PERMANENT.intersection(numbers)


def storage_error(problem: str, error: Exception, cure: str = "") -> StorageError:
    """The error to raise for `error`: an `UnreachableError` if the same call may succeed later.

    `cure` is the one for a folder; an object store's answer has its own.
    """
    if not is_transient(error):
        return StorageError(f"{problem} ({_reason(error)}). {_cure(error) or cure}".rstrip())
    if _NO_CREDENTIALS.search(str(error)):
        return UnreachableError(f"{problem} (no credentials found). {_RENEW}")
    return UnreachableError(f"{problem} ({_reason(error)}). Check that it is up and can be reached from here.")


def http_status(error: Exception) -> int | None:
    """The status of the object store's answer; None if there was none."""
    found = _STATUS.search(str(error))
    return int(found.group(1)) if found else None


def _reason(error: Exception) -> str:
    """The error in one line. obstore's text has the whole answer and the client's state."""
    text = str(error).partition("\n\nDebug source")[0]
    status = _STATUS.search(text)
    if status is None:
        return text.rpartition(" - ")[2] if isinstance(error, BaseError) else text
    parts = [f"HTTP {status.group(1)}{status.group(2).rstrip()}"]
    parts += [found.group(1) for pattern in (_CODE, _MESSAGE) if (found := pattern.search(text))]
    return " ".join(": ".join(parts).split())


def _cure(error: Exception) -> str:
    code = _CODE.search(str(error))
    status = http_status(error)
    if code and (code.group(1) in _CURES or status == 400):
        return _CURES.get(code.group(1), "")
    return _CURES_BY_STATUS.get(status or 0, "")
