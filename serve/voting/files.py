"""A study on storage. The tables of the database are made from these files, and can be made again from them.

<storage>/studies/<name>/study.json                    what never changes: models, questions, answers, assignments
                         raters/<rater>.json           a rater's name, or when the rater's data were deleted
                         added/<rater>.json            assignments of a rater who joined later
                         votes/<rater>/<assignment>-<round>.json            a vote
                                       <assignment>-<round>.withdrawn.json  that vote was withdrawn
                                       <assignment>.revealed.json           the rater learnt which models these are
                         judges/<judge>.json           what a language model says of the same answers
                                <judge>/answers/       its replies
                         closed.json                   no more votes
                         draft/                        answers of a study that is being prepared

Each of them is written once, whole, and none is changed, except that deleting a rater's data removes `votes/<rater>`.
"""

import hashlib
import re
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.errors import NotPublishedError, UsageError
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

STUDIES = "studies"
NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
AXES = ("naturalness", "correctness", "stability")
"""Known to the page in every language. Others are shown as they are written."""
AXIS_PATTERN = r"[\w -]{1,40}"
MOST_SCORE = 2

Outcome = Literal["left", "right", "tie", "both bad"]
Kind = Literal["real", "repeat", "control", "attention"]
Reveal = Literal["vote", "end"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudyModel(_Part):
    """Which weights a model of the study was."""

    id: str
    adapter_digest: str | None = Field(description="None for a base.")
    base_fingerprint: str | None
    base_precision: str | None = None
    template_digest: str | None = Field(default=None, description="Of the adapter's chat template.")


class Settings(_Part):
    """How a study was made."""

    votes_per_item: int
    repeats: float = Field(description="Share of a rater's comparisons that return with the sides swapped.")
    controls: float = Field(description="Share of comparisons of a model with itself, of a rater's others.")
    axes: list[str] = Field(description="What raters may score besides the vote.")
    reveal: Reveal = Field(description="When a rater may see the models: after each vote, or after the last one.")
    seed: int = Field(description="Of the answers, and of sides and order.")
    temperature: float
    max_tokens: int
    questions: str = Field(description="The file, or the run whose validation split was used.")
    questions_digest: str = Field(description="SHA-256 of the file, or the digest of the run's dataset.")
    attention_digest: str | None = Field(description="SHA-256 of the file of attention items.")


class Turn(_Part):
    role: Literal["system", "user", "assistant"]
    content: str


class Question(_Part):
    id: str
    name: str
    turns: list[Turn]


class PreparedAnswer(_Part):
    model: str | None = Field(description="None for an answer that the makers of the study wrote.")
    text: str
    is_cut: bool = Field(default=False, description="Whether it ended at the largest length.")


class Comparison(_Part):
    """Two answers to a question. Of an attention item the first is the right one."""

    id: str
    question: str
    kind: Literal["real", "control", "attention"]
    first: PreparedAnswer
    second: PreparedAnswer
    digest: str


class Assignment(_Part):
    id: str
    rater: str
    comparison: str
    kind: Kind
    position: int
    first_is_left: bool


class StudyFile(StoredFile):
    """study.json"""

    name: str
    title: str
    created: datetime
    settings: Settings
    models: list[StudyModel]
    questions: list[Question]
    comparisons: list[Comparison]
    raters: list[str] = Field(description="Ids; names are in files of their own, so that they can be deleted.")
    assignments: list[Assignment]

    @property
    def model_ids(self) -> list[str]:
        return [model.id for model in self.models]


class RaterFile(StoredFile):
    """raters/<rater>.json"""

    id: str
    name: str | None
    deleted: datetime | None = None


class AddedFile(StoredFile):
    """added/<rater>.json"""

    rater: str
    time: datetime
    assignments: list[Assignment]


class VoteFile(StoredFile):
    """votes/<rater>/<assignment>-<round>.json"""

    study: str
    study_digest: str
    rater: str
    assignment: str
    round: int
    kind: Kind
    comparison: str
    comparison_digest: str
    left: str | None = Field(description="The model whose answer stood left; None in an attention item.")
    right: str | None
    outcome: Outcome
    scores: dict[str, int]
    note: str
    seconds: float | None
    time: datetime


class WithdrawnFile(StoredFile):
    """votes/<rater>/<assignment>-<round>.withdrawn.json"""

    assignment: str
    round: int
    time: datetime


class RevealedFile(StoredFile):
    """votes/<rater>/<assignment>.revealed.json"""

    assignment: str
    time: datetime
    void: list[str] = Field(description="Assignments of the rater that can no longer be judged blind.")


class JudgeVerdict(_Part):
    """A judge's verdict on a comparison."""

    comparison: str
    winner: str | None = Field(description="The model; None for neither.")
    disagreed: bool = Field(description="Whether the two orders named different answers, which counts as neither.")


class JudgeFile(StoredFile):
    """judges/<judge>.json"""

    model: str
    rubric: str
    study_digest: str
    time: datetime
    verdicts: list[JudgeVerdict]
    unread: int = Field(description="Comparisons without two verdicts that could be read.")


class ClosedFile(StoredFile):
    """closed.json"""

    time: datetime


class StudyFolder:
    """The files of one study on storage."""

    def __init__(self, storage: Storage, name: str) -> None:
        """Raises `UsageError` for a name that cannot be one."""
        if not re.fullmatch(NAME_PATTERN, name):
            raise UsageError(f"NAME = {name!r}: use lower-case letters, digits and dashes, at most 63.")
        self.storage = storage
        self.name = name
        self.path = f"{STUDIES}/{name}"

    @property
    def draft(self) -> str:
        return f"{self.path}/draft"

    def exists(self) -> bool:
        return self.storage.exists(f"{self.path}/study.json")

    def read(self) -> tuple[StudyFile, str]:
        """The study, and the SHA-256 of its file. Raises `NotPublishedError`."""
        path = f"{self.path}/study.json"
        if not self.storage.exists(path):
            raise NotPublishedError(f"NAME = {self.name!r}: {self.storage.root} has no such study. See ft study list.")
        content = self.storage.read_bytes(path)
        return StudyFile.parse(content, path), hashlib.sha256(content).hexdigest()

    def write(self, study: StudyFile, raters: list[RaterFile]) -> None:
        """The study's own file comes last: without it there is no study."""
        for rater in raters:
            self.write_rater(rater)
        self._write("study.json", study)

    def write_rater(self, rater: RaterFile) -> None:
        self._write(f"raters/{rater.id}.json", rater)

    def raters(self, study: StudyFile) -> list[RaterFile]:
        """Raters from the start and later ones; files that an interrupted command has left are not among them."""
        ids = [*study.raters, *(one.rater for one in self.added())]
        return [self._read(f"raters/{rater}.json", RaterFile) for rater in ids]

    def write_added(self, added: AddedFile) -> None:
        self._write(f"added/{added.rater}.json", added)

    def added(self) -> list[AddedFile]:
        """The raters who joined later, with their assignments."""
        names = self.storage.files(f"{self.path}/added")
        return [self._read(f"added/{name}", AddedFile) for name in names if name.endswith(".json")]

    def write_vote(self, vote: VoteFile) -> None:
        """Again for the same assignment and round replaces it, so that a vote that got no reply is not kept twice."""
        self._write(f"votes/{vote.rater}/{vote.assignment}-{vote.round}.json", vote)

    def write_withdrawn(self, rater: str, withdrawn: WithdrawnFile) -> None:
        self._write(f"votes/{rater}/{withdrawn.assignment}-{withdrawn.round}.withdrawn.json", withdrawn)

    def write_revealed(self, rater: str, revealed: RevealedFile) -> None:
        self._write(f"votes/{rater}/{revealed.assignment}.revealed.json", revealed)

    def votes_of(self, rater: str) -> tuple[list[VoteFile], list[WithdrawnFile], list[RevealedFile]]:
        """Everything that a rater did."""
        votes: list[VoteFile] = []
        withdrawn: list[WithdrawnFile] = []
        revealed: list[RevealedFile] = []
        for name in self.storage.files(f"{self.path}/votes/{rater}"):
            path = f"votes/{rater}/{name}"
            if name.endswith(".withdrawn.json"):
                withdrawn.append(self._read(path, WithdrawnFile))
            elif name.endswith(".revealed.json"):
                revealed.append(self._read(path, RevealedFile))
            elif name.endswith(".json"):
                votes.append(self._read(path, VoteFile))
        return votes, withdrawn, revealed

    def delete_votes(self, rater: str) -> None:
        self.storage.delete(f"{self.path}/votes/{rater}")

    def judge_folder(self, judge: str) -> str:
        return f"{self.path}/judges/{judge}"

    def write_judge(self, judge: str, content: JudgeFile) -> None:
        self._write(f"judges/{judge}.json", content)

    def judges(self) -> list[JudgeFile]:
        names = sorted(name for name in self.storage.files(f"{self.path}/judges") if name.endswith(".json"))
        return [self._read(f"judges/{name}", JudgeFile) for name in names]

    def write_closed(self, time: datetime) -> None:
        self._write("closed.json", ClosedFile(time=time))

    def closed(self) -> datetime | None:
        return self._read("closed.json", ClosedFile).time if self.storage.exists(f"{self.path}/closed.json") else None

    def _write(self, name: str, content: StoredFile) -> None:
        self.storage.write_bytes(f"{self.path}/{name}", (content.model_dump_json(indent=1) + "\n").encode())

    def _read(self, name: str, kind: type[Any]) -> Any:
        path = f"{self.path}/{name}"
        return kind.parse(self.storage.read_bytes(path), path)
