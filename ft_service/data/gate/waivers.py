"""What a judgement means for a run: a failing finding stops it, unless the spec waives its code."""

from collections.abc import Mapping

from ft_service.data.gate import CODES, Finding, Judgement
from ft_service.errors import DataError, Problem, SpecError
from ft_service.registry.registry import Waiver
from ft_service.text import counted

_SHOWN_PLACES = 3


class GateError(DataError):
    """Failing findings of the data gate stop the run."""


def check_waivers(waive: Mapping[str, str]) -> None:
    """Raises `SpecError` if the spec waives an unknown code, or gives no reason."""
    problems = [
        Problem(
            f"data.waive.{code}", reason, "is not a code of the data gate", "Use a code that `ft data check` reports."
        )
        for code, reason in waive.items()
        if code not in CODES
    ]
    problems += [
        Problem(
            f"data.waive.{code}",
            reason,
            "is not a reason",
            "Say why you accept the finding; the adapter's record keeps the reason.",
        )
        for code, reason in waive.items()
        if code in CODES and not reason.strip()
    ]
    if problems:
        raise SpecError(problems)


def waivers(judgement: Judgement, waive: Mapping[str, str]) -> list[Waiver]:
    """The findings that the spec waives, with its reasons. Waived codes without a finding are skipped."""
    return [
        Waiver(code=finding.code, severity=finding.severity, count=finding.count, reason=waive[finding.code])
        for finding in judgement.findings
        if finding.code in waive
    ]


def enforce(judgement: Judgement, waive: Mapping[str, str], report: str) -> None:
    """Raises `GateError` if a failing finding is not waived; `report` is the path of the full report."""
    failing = [finding for finding in judgement.findings if finding.severity == "fail" and finding.code not in waive]
    if not failing:
        return
    raise GateError(
        f"The data check fails: {counted(len(failing), 'finding')}.\n"
        + "\n".join(_summary(finding) for finding in failing)
        + f"\nFull report: {report}\nTo accept a finding, waive its code in the spec and give a reason, which the "
        f"adapter's record keeps: data: {{waive: {{{failing[0].code}: REASON}}}}"
    )


def _summary(finding: Finding) -> str:
    places = "; ".join(
        ": ".join(part for part in (str(place), place.detail) if part) for place in finding.places[:_SHOWN_PLACES]
    )
    more = f"; and {finding.count - _SHOWN_PLACES} more" if finding.count > _SHOWN_PLACES else ""
    message = f" {finding.message}" if finding.message else ""
    place_line = f"\n    {places}{more}" if places else ""
    title = f"  - {finding.code} ({finding.count_text}, {finding.percent}):"
    return f"{title}{message} {finding.why} {finding.cure}{place_line}"
