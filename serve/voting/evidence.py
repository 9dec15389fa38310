"""What votes of people say about an adapter, from the files on storage: what a promotion may ask for."""

from ft_service.evaluate.promotion import PeoplesVotes
from ft_service.evaluate.statistics.intervals import clustered_share
from ft_service.storage.storage import Storage
from serve.voting.files import STUDIES, StudyFolder
from serve.voting.stored import stored_votes


def votes_about(storage: Storage, adapter_digest: str) -> PeoplesVotes:
    """Votes that compare these weights with others, in all studies, and the share of them that the adapter wins.

    Hidden repeats, controls, attention items and withdrawn votes do not count. A tie and "both bad" are half a win.
    The interval respects raters and questions.
    """
    wins: list[float] = []
    raters: list[str] = []
    questions: list[str] = []
    for name in storage.folders(STUDIES):
        folder = StudyFolder(storage, name)
        if not folder.exists():
            continue  # it is being prepared
        study, _ = folder.read()
        if adapter_digest not in {model.adapter_digest for model in study.models}:
            continue
        for vote in stored_votes(folder):
            if vote.kind != "real" or adapter_digest not in (vote.left_digest, vote.right_digest):
                continue
            won = {"left": vote.left_digest, "right": vote.right_digest}.get(vote.outcome, "")
            wins.append(0.5 if vote.winner is None else float(won == adapter_digest))
            raters.append(f"{name}/{vote.rater}")
            questions.append(f"{name}/{vote.question_id}")
    share = clustered_share(wins, raters, questions) if wins else None
    return PeoplesVotes(len(wins), share, len(set(raters)))
