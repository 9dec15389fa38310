"""Rights: the conditions that the licenses of the sources and of the base put on publishing the adapter.

A summary by kind, not legal advice. Ids are SPDX ids (spdx.org/licenses), or the hub's names of the same licenses.
"""

import re
from collections.abc import Sequence
from typing import Literal

from ft_service.catalog.models import find
from ft_service.data.gate.findings import Finding, Place, source_finding
from ft_service.data.gate.records import Source

Kind = Literal["free", "attribution", "share-alike", "restricted-use", "non-commercial", "no-derivatives", "unknown"]
_STRICTEST: tuple[Kind, ...] = (
    "free",
    "attribution",
    "share-alike",
    "restricted-use",
    "non-commercial",
    "no-derivatives",
    "unknown",
)

_FREE = "CC0-1.0 PDDL PDDL-1.0 Unlicense 0BSD WTFPL MIT-0 CC-PDDC LicenseRef-OWN LicenseRef-public-domain"
_ATTRIBUTION = (
    "MIT Apache-2.0 BSD-2-Clause BSD-3-Clause ISC PSF-2.0 Python-2.0 ODC-By-1.0 CDLA-Permissive-1.0 "
    "CDLA-Permissive-2.0 OGL-UK-3.0 etalab-2.0 Zlib BSL-1.0 Artistic-2.0 AFL-3.0 ECL-2.0 NCSA PostgreSQL MS-PL "
    "DL-DE-BY-2.0 NLOD-2.0 C-UDA C-UDA-1.0 ODC-By BSD"
)
_SHARE_ALIKE = (
    "ODbL ODbL-1.0 GFDL GFDL-1.1 GFDL-1.2 GFDL-1.3 GPL GPL-2.0 GPL-3.0 AGPL-3.0 LGPL LGPL-2.1 LGPL-3.0 MPL-2.0 EPL-2.0 "
    "EUPL-1.2 OSL-3.0 CDLA-Sharing-1.0"
)
_RESTRICTED_USE = (
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma openrail openrail++ bigscience-openrail-m "
    "creativeml-openrail-m bigcode-openrail-m deepfloyd-if-license"
)
"""Licenses of data made by such models: they list forbidden uses, and some require a name."""
_NON_COMMERCIAL = "PolyForm-Noncommercial-1.0.0"
_TABLE: dict[str, Kind] = {
    **{name.lower(): "free" for name in _FREE.split()},
    **{name.lower(): "attribution" for name in _ATTRIBUTION.split()},
    **{name.lower(): "share-alike" for name in _SHARE_ALIKE.split()},
    **{name.lower(): "restricted-use" for name in _RESTRICTED_USE.split()},
    **{name.lower(): "non-commercial" for name in _NON_COMMERCIAL.split()},
}
_CREATIVE_COMMONS = re.compile(r"cc-by(-nc)?(-nd|-sa)?-(?:1\.0|2\.0|2\.1|2\.5|3\.0|4\.0)(?:-[a-z]{2,4})?")
_OPERATOR = re.compile(r"\s+(AND|OR)\s+", re.IGNORECASE)


def license_kinds(license: str) -> frozenset[Kind]:
    """The conditions of an SPDX expression. "A OR B" gives those of the milder one; "A AND B" gives both."""
    expression = license.strip().strip("()")
    parts = _OPERATOR.split(expression)
    if "(" in expression or len({operator.upper() for operator in parts[1::2]}) > 1:
        return frozenset({"unknown"})  # nested expressions are rare for data, and a wrong result is worse than none
    kinds = [_kinds_of_one(part) for part in parts[::2]]
    if len(parts) > 1 and parts[1].upper() == "OR":
        return min(kinds, key=lambda kinds: max(_STRICTEST.index(kind) for kind in kinds))
    return frozenset().union(*kinds)


def _kinds_of_one(license: str) -> frozenset[Kind]:
    name = license.split(" WITH ")[0].strip().lower().removesuffix("+")
    name = re.sub(r"-(?:only|or-later)$", "", name)
    if match := _CREATIVE_COMMONS.fullmatch(name):
        second: dict[str | None, Kind] = {"-nd": "no-derivatives", "-sa": "share-alike"}
        kinds: set[Kind] = {"attribution"}
        if match[1]:
            kinds.add("non-commercial")
        if match[2]:
            kinds.add(second[match[2]])
        return frozenset(kinds)
    return frozenset({_TABLE.get(name, "unknown")})


def check_rights(sources: Sequence[Source]) -> list[Finding]:
    """Findings on the origin and the license of each source."""
    by_code: dict[str, list[Place]] = {}

    def add(code: str, source: Source, detail: str) -> None:
        by_code.setdefault(code, []).append(Place(file=source.path, line=0, detail=detail))

    for source in sources:
        if not (source.source or "").strip():
            add("rights.no-source", source, "has no `source`")
        if not (source.license or "").strip():
            add("rights.no-license", source, "has no `license`")
            continue
        license = source.license or ""
        for kind in sorted(license_kinds(license) - {"free"}):
            add(f"rights.{kind}-license" if kind == "unknown" else f"rights.{kind}", source, license)
    return [source_finding(code, places, len(places) / len(sources)) for code, places in by_code.items()]


def base_duties(base: str) -> list[Finding]:
    """The conditions of the base's license, if the base is in the catalog."""
    facts = find(base)
    if facts is None:
        return []
    finding = source_finding("rights.base-license", [Place(file=facts.id, line=0, detail=facts.license.name)], 1.0)
    return [finding.model_copy(update={"message": " ".join(facts.license.duties)})]
