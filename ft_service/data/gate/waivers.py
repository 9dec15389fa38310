"""The data gate: what a judgement means for a run. A finding that fails stops it, unless the spec waives its code."""

from collections.abc import Mapping

from ft_service.data.gate import CODES, Finding, Judgement
from ft_service.errors import DataError, Problem, SpecError
from ft_service.registry.registry import Waiver
from ft_service.text import counted

_SHOWN_PLACES = 3


class GateError(DataError):
    """The data gate refuses the data."""


def check_waivers(waive: Mapping[str, str]) -> None:
    """Raises `SpecError` where the spec waives a code that does not exist, or gives no reason."""
    problems = [
        Problem(f"data.waive.{code}", reason, "is no code of the data gate", "`ft data check` tells the codes.")
        for code, reason in waive.items()
        if code not in CODES
    ]
    problems += [
        Problem(f"data.waive.{code}", reason, "is no reason", "Say why the finding is accepted; the record keeps it.")
        for code, reason in waive.items()
        if code in CODES and not reason.strip()
    ]
    if problems:
        raise SpecError(problems)


def waivers(judgement: Judgement, waive: Mapping[str, str]) -> list[Waiver]:
    """What of the findings is accepted, and why; codes that were not found are no waivers."""
    return [
        Waiver(code=finding.code, severity=finding.severity, count=finding.count, reason=waive[finding.code])
        for finding in judgement.findings
        if finding.code in waive
    ]


def enforce(judgement: Judgement, waive: Mapping[str, str], report: str) -> None:
    """Raises `GateError` if a finding fails that is not waived; `report` is where all of it can be read."""
    failing = [finding for finding in judgement.findings if finding.severity == "fail" and finding.code not in waive]
    if not failing:
        return
    raise GateError(
        f"The data gate refuses the data: {counted(len(failing), 'finding')}.\n"
        + "\n".join(_told(finding) for finding in failing)
        + f"\nAll of it: {report}\nTo accept one, give its reason in the spec, which the adapter's record keeps: "
        f"data: {{waive: {{{failing[0].code}: why}}}}"
    )


def _told(finding: Finding) -> str:
    places = "; ".join(f"{place} {place.detail}".strip() for place in finding.places[:_SHOWN_PLACES])
    more = f"; and {finding.count - _SHOWN_PLACES} more" if finding.count > _SHOWN_PLACES else ""
    message = f" {finding.message}" if finding.message else ""
    found = f"\n    {places}{more}" if places else ""
    return f"  - {finding.code} ({finding.count:,}, {finding.percent}):{message} {finding.why} {finding.cure}{found}"
