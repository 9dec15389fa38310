"""The gate's report: findings with their places, and the judgement of all of them. Written and read as JSON."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.data.gate.codes import CODES, Severity
from ft_service.storage.formats import StoredFile, renamed
from ft_service.text import counted

Verdict = Literal["pass", "warn", "fail"]


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Report):
    """Where a finding is, and what is wrong there."""

    file: str
    line: int = Field(description="Line, row or record number from 1; 0 means the whole file.")
    detail: str = Field(default="", description="What is wrong with this record.")
    excerpt: str = Field(default="", description="A piece of the record, with private data masked.")

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Finding(_Report):
    """A problem of the data, or a fact worth knowing."""

    code: str
    severity: Severity
    count: int = Field(description="Records with the finding; for some codes sources, columns or files.")
    share: float = Field(description="Share of all records read (of all sources, for rights).")
    places: list[Place] = Field(description="The first places, in order of the data.")
    why: str
    cure: str
    message: str = Field(default="", description="Details, where the count alone does not explain the finding.")

    @property
    def count_text(self) -> str:
        """The count with what it counts: ``3 records``, ``1 source``."""
        return counted(self.count, CODES[self.code].counts if self.code in CODES else "record")

    @property
    def percent(self) -> str:
        """The share in per cent; a small share never reads as 0.0%."""
        return percent(self.share)


def percent(share: float) -> str:
    """A share in per cent; a small one never reads as 0.0%."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


class SourceCount(_Report):
    """The records of one source."""

    path: str
    license: str | None
    read: int = Field(description="Records read.")
    usable: int = Field(description="Records that are not left out, for training or validation.")
    tokens: int = Field(description="Tokens of its training records.")
    loss_tokens: int
    findings: dict[str, int] = Field(description="Code -> records.")


class Histogram(_Report):
    """A histogram; `counts[i]` values lie in [edges[i], edges[i + 1])."""

    unit: Literal["tokens", "characters"]
    edges: list[int]
    counts: list[int]


class Signal(_Report):
    """The tokens of the training records; all zero without a tokenizer."""

    records: int
    tokens: int = Field(description="Tokens within max_seq_len.")
    loss_tokens: int
    lost_tokens: int = Field(description="Tokens beyond max_seq_len.")
    lost_loss_tokens: int

    @property
    def loss_share(self) -> float:
        """Loss tokens as a share of all tokens within max_seq_len."""
        return self.loss_tokens / self.tokens if self.tokens else 0.0


class Entropy(_Report):
    """How varied something is among the records."""

    bits: float
    effective: float = Field(description="2 ** bits: this many equally frequent kinds would be as varied.")
    kinds: int
    largest_share: float
    largest: str = Field(default="", description="An example of the most frequent kind, if there is one.")


class SizeAdvice(_Report):
    """What the training records are enough for."""

    training_records: int = Field(description="Usable records that are not held out for validation.")
    level: Literal["too few", "little", "narrow skill", "between", "stable skill", "broad skill", "expert"]
    text: str
    epochs: float
    steps: int | None = Field(description="Optimizer steps in these epochs; null without a tokenizer.")


class Judgement(StoredFile):
    """All findings and figures of the gate. read = usable + left out; usable = for training + for validation."""

    verdict: Verdict
    findings: list[Finding] = Field(description="The most severe first.")
    read: int = Field(description="Records read.")
    usable: int = Field(description="Records that are not left out, for training or validation.")
    left_out: dict[str, int] = Field(description="Code -> records left out because of it.")
    sources: list[SourceCount]
    lengths: Histogram
    signal: Signal
    entropy: dict[str, Entropy] = Field(description="Of the openings of answers and questions, and of labels.")
    size: SizeAdvice

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        """Format 1 called the training records of `size` usable."""
        return {**data, "size": renamed(data["size"], {"usable": "training_records"})}

    def finding(self, code: str) -> Finding | None:
        """The finding with this code, if there is one."""
        return next((finding for finding in self.findings if finding.code == code), None)

    @property
    def num_left_out(self) -> int:
        """Records left out."""
        return sum(self.left_out.values())

    @property
    def validation_records(self) -> int:
        """Usable records that are for validation."""
        return self.usable - self.size.training_records

    @property
    def records_text(self) -> str:
        """The records read, usable and left out, in one line; every number says what it counts."""
        training = self.size.training_records
        validation = self.validation_records
        split = f" ({training:,} for training, {validation:,} for validation)" if validation else ""
        codes = ", ".join(f"{count:,} {code}" for code, count in self.left_out.items())
        left_out = f"; {self.num_left_out:,} left out: {codes}" if codes else ""
        return f"{counted(self.read, 'record')} read, {self.usable:,} usable{split}{left_out}"


def source_finding(code: str, places: list[Place], share: float) -> Finding:
    """A finding about sources, not about records; `share` is the share of all sources."""
    known = CODES[code]
    return Finding(
        code=code,
        severity=known.severity(share),
        count=len(places),
        share=share,
        places=places,
        why=known.why,
        cure=known.cure,
    )


_SEVERITY_ORDER: dict[Severity, int] = {"fail": 0, "warn": 1, "info": 2}


def by_severity(findings: list[Finding]) -> list[Finding]:
    """The most severe findings first; among equally severe ones, the most frequent first."""
    return sorted(findings, key=lambda finding: (_SEVERITY_ORDER[finding.severity], -finding.share, finding.code))


def verdict_of(findings: list[Finding]) -> Verdict:
    """The highest severity of the findings; info counts as a pass."""
    severities = {finding.severity for finding in findings}
    return "fail" if "fail" in severities else "warn" if "warn" in severities else "pass"
