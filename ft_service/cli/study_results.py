"""What studies on storage say of an adapter, for its page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ft_service.errors import DataError
from ft_service.registry.registry import AdapterRecord
from ft_service.storage.storage import Storage

if TYPE_CHECKING:
    from ft_service.pages.adapter_page import StudyResult


def stored_studies(storage: Storage, record: AdapterRecord) -> "list[StudyResult]":
    """The studies about exactly these weights, by their files: a database is not needed."""
    return list(_stored_studies(storage, record))


def _stored_studies(storage: Storage, record: AdapterRecord) -> "Iterator[StudyResult]":
    from serve.voting.files import STUDIES, StudyFolder

    names = sorted(storage.folders(STUDIES))
    if not names:
        return  # the imports below take time
    from ft_service.pages.adapter_page import StudyResult
    from serve.voting.judges import judge_lines
    from serve.voting.results import result_lines, study_result
    from serve.voting.stored import stored_votes

    for name in names:
        folder = StudyFolder(storage, name)
        if not folder.exists():
            continue  # is being prepared
        study, _ = folder.read()
        if not any(model.id == record.id and model.adapter_digest == record.digest for model in study.models):
            continue
        votes = stored_votes(folder)
        try:
            lines = result_lines(study_result(votes, [model.id for model in study.models]))
        except DataError:
            lines = ["No vote compares two models yet."]
        lines += judge_lines(folder, votes)
        real = sum(vote.kind == "real" and record.id in (vote.left_model, vote.right_model) for vote in votes)
        yield StudyResult(name, study.title, folder.closed() is not None, real, lines)
