"""Checks uploaded training files, one at a time, in a thread of its own: everything else goes on meanwhile."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from ft_service.chat.format import ChatFormat
from ft_service.errors import DatabaseError, DataError, ModelError, StorageError
from ft_service.model.base import load_tokenizer
from serve.fine_tuning.file_records import FileRecords, FoundFile
from serve.fine_tuning.file_wire import FileValidation, TokenCounts
from serve.fine_tuning.files import FileStore
from serve.fine_tuning.validation import Checked, NamedTokenizer, check_file

logger = logging.getLogger(__name__)


class FileChecks:
    """The checks of one process. `bases` are names and folders of the bases whose tokens are counted."""

    def __init__(self, records: FileRecords, store: FileStore, bases: Mapping[str, Path], min_examples: int) -> None:
        self._records = records
        self._store = store
        self._bases = bases
        self._min_examples = min_examples
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check-files")

    def start(self, file: FoundFile) -> Future[None]:
        """Check a file after those that wait already. The result is in the records."""
        return self._thread.submit(self.check, file)

    def check(self, file: FoundFile) -> None:
        """Record status, errors and token counts. What the storage or the database prevents is done again later."""
        try:
            with self._store.local(file.digest, file.size) as path:
                checked = check_file(path, file.digest, file.size, self._tokenizers, self._min_examples)
            if checked.listed:
                errors = ({"id": str(number), **asdict(one)} for number, one in enumerate(checked.listed, 1))
                self._store.write_errors(file.id, errors)
            self._records.end_check(file.id, "error" if checked.errors else "processed", *_outcome(checked))
        except (StorageError, DatabaseError, DataError) as error:
            logger.warning("%s: its check is put off (%s)", file.id, error)
        except Exception as error:
            logger.exception("%s: its check failed", file.id)
            reason = f"The file could not be checked ({type(error).__name__}). This is a bug; please report it."
            self._records.end_check(file.id, "error", reason, None)

    @cached_property
    def _tokenizers(self) -> Sequence[NamedTokenizer]:
        return tokenizers_of(self._bases)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def tokenizers_of(bases: Mapping[str, Path]) -> list[NamedTokenizer]:
    """The tokenizers of bases, each once. Bases without a chat format are left out."""
    by_digest: dict[str, list[str]] = {}
    for name, folder in bases.items():
        file = folder / "tokenizer.json"
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(folder)
        by_digest.setdefault(digest, []).append(name)
    found = []
    for names in by_digest.values():
        try:
            found.append(NamedTokenizer(tuple(names), ChatFormat(load_tokenizer(bases[names[0]]))))
        except ModelError as error:
            logger.warning("tokens of %s are not counted: %s", ", ".join(names), error)
    return found


def _outcome(checked: Checked) -> tuple[str | None, FileValidation]:
    validation = FileValidation(
        examples=checked.examples,
        valid_examples=checked.valid_examples,
        errors=checked.num_errors,
        errors_by_code=dict(checked.errors),
        token_counts=[
            TokenCounts(
                bases=list(counts.bases),
                tokens=counts.tokens,
                trained_tokens=counts.trained_tokens,
                longest_example=counts.longest_example,
            )
            for counts in checked.counts
        ],
    )
    return checked.details(), validation
