"""What the gate says: findings with their places, and the judgement over all of them. JSON in, JSON out."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.data.gate.codes import CODES, Severity

Verdict = Literal["pass", "warn", "fail"]


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Said):
    """Where a record stands, and what was seen there."""

    file: str
    line: int = Field(description="Line, row or record number from 1; 0 is the whole file.")
    detail: str = Field(default="", description="What is wrong with this record.")
    excerpt: str = Field(default="", description="A piece of it, private data masked.")

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Finding(_Said):
    """One thing that is wrong, or worth knowing."""

    code: str
    severity: Severity
    count: int = Field(description="Records it concerns (sources, for rights).")
    share: float = Field(description="Of all records read (of all sources, for rights).")
    places: list[Place] = Field(description="The first of them, in order.")
    why: str
    cure: str
    message: str = Field(default="", description="What was found, where a count does not say it.")

    @property
    def percent(self) -> str:
        """The share as people read it: what is there never looks like nothing."""
        return "<0.1%" if 0 < self.share < 0.0005 else f"{self.share:.1%}"


class SourceCount(_Said):
    """What one source holds."""

    path: str
    license: str | None
    read: int
    usable: int
    tokens: int
    loss_tokens: int
    findings: dict[str, int] = Field(description="Code -> records.")


class Histogram(_Said):
    """Counts between edges; `counts[i]` lies in [edges[i], edges[i + 1])."""

    unit: Literal["tokens", "characters"]
    edges: list[int]
    counts: list[int]


class Signal(_Said):
    """What of the data is trained on, in tokens; all zero where no tokenizer was at hand."""

    records: int
    tokens: int = Field(description="Within max_seq_len.")
    loss_tokens: int
    lost_tokens: int = Field(description="Beyond max_seq_len.")
    lost_loss_tokens: int

    @property
    def loss_share(self) -> float:
        """Loss tokens among all tokens."""
        return self.loss_tokens / self.tokens if self.tokens else 0.0


class Entropy(_Said):
    """How varied something is over the records."""

    bits: float
    effective: float = Field(description="2 ** bits: as many equally frequent kinds would be as varied.")
    kinds: int
    largest_share: float
    largest: str = Field(default="", description="The most frequent kind, where it could be looked up.")


class SizeAdvice(_Said):
    """What this many records are enough for."""

    usable: int
    level: Literal["too few", "little", "narrow skill", "between", "stable skill", "broad skill", "expert"]
    text: str
    epochs: float
    steps: int | None = Field(description="Optimizer steps of these epochs; none without token counts.")


class Judgement(_Said):
    """Everything the gate found. `counts` add up: read = usable + all that were left out."""

    verdict: Verdict
    findings: list[Finding] = Field(description="The gravest first.")
    read: int
    usable: int
    left_out: dict[str, int] = Field(description="Code -> records left out for it.")
    sources: list[SourceCount]
    lengths: Histogram
    signal: Signal
    entropy: dict[str, Entropy] = Field(description="Of openings of answers, templates of questions, and labels.")
    size: SizeAdvice

    def finding(self, code: str) -> Finding | None:
        """The finding of that code, if there is one."""
        return next((finding for finding in self.findings if finding.code == code), None)


def of_sources(code: str, places: list[Place], share: float) -> Finding:
    """A finding on this share of the sources, not on their records."""
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


_GRAVITY: dict[Severity, int] = {"fail": 0, "warn": 1, "info": 2}


def by_gravity(findings: list[Finding]) -> list[Finding]:
    """The gravest first; of equally grave ones the more frequent."""
    return sorted(findings, key=lambda finding: (_GRAVITY[finding.severity], -finding.share, finding.code))


def verdict_of(findings: list[Finding]) -> Verdict:
    """The gravest severity, where info counts as a pass."""
    severities = {finding.severity for finding in findings}
    return "fail" if "fail" in severities else "warn" if "warn" in severities else "pass"
