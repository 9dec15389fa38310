"""How many votes of people there are about an adapter, from the files on storage: what a promotion may ask for."""

from ft_service.storage.storage import Storage
from serve.voting.files import STUDIES, StudyFolder


def num_votes_about(storage: Storage, adapter_digest: str) -> int:
    """Votes that compare these weights with others, in all studies.

    Hidden repeats, controls and withdrawn votes do not count.
    """
    return sum(_in_study(StudyFolder(storage, name), adapter_digest) for name in storage.folders(STUDIES))


def _in_study(folder: StudyFolder, adapter_digest: str) -> int:
    if not folder.exists():
        return 0  # it is being prepared
    study, _ = folder.read()
    models = {model.id for model in study.models if model.adapter_digest == adapter_digest}
    if not models:
        return 0
    counted: set[tuple[str, str]] = set()
    for rater in folder.raters(study):
        votes, withdrawn, _ = folder.votes_of(rater.id)
        gone = {(one.assignment, one.round) for one in withdrawn}
        counted |= {
            (rater.id, vote.assignment)
            for vote in votes
            if vote.kind == "real" and {vote.left, vote.right} & models and (vote.assignment, vote.round) not in gone
        }
    return len(counted)
