"""Rights: the conditions that the licenses of the sources and of the base put on publishing the adapter.

A summary by kind, not legal advice. Ids are SPDX ids (spdx.org/licenses), or the hub's names of the same licenses.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from boolean import ParseError
from license_expression import (
    OR,
    ExpressionError,
    LicenseSymbol,
    LicenseWithExceptionSymbol,
    Licensing,
    get_license_index,
)

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

_KIND_OF_CATEGORY: dict[str, Kind] = {
    "Public Domain": "free",
    "Permissive": "attribution",
    "Copyleft": "share-alike",
    "Copyleft Limited": "share-alike",
}
"""The categories of ScanCode's license database, which the package `license-expression` brings along."""
_FREE = "0BSD MIT-0 PDDL LicenseRef-OWN LicenseRef-public-domain"
_ATTRIBUTION = "ODC-By C-UDA C-UDA-1.0 BSD"
_COMMON = "MIT Apache-2.0 BSD-2-Clause BSD-3-Clause ISC"
"""Permissive licenses of the database that need no reading of it, which takes half a second."""
_SHARE_ALIKE = "ODbL GFDL GPL LGPL"
"""What the categories do not tell apart, names of our own, and the hub's names without versions."""
_RESTRICTED_USE = (
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma openrail openrail++ bigscience-openrail-m "
    "creativeml-openrail-m bigcode-openrail-m deepfloyd-if-license"
)
"""Licenses of data made by such models: they list forbidden uses, and some require a name."""
_NON_COMMERCIAL = "PolyForm-Noncommercial-1.0.0"
_OURS: dict[str, Kind] = {
    **{name.lower(): "free" for name in _FREE.split()},
    **{name.lower(): "attribution" for name in (*_ATTRIBUTION.split(), *_COMMON.split())},
    **{name.lower(): "share-alike" for name in _SHARE_ALIKE.split()},
    **{name.lower(): "restricted-use" for name in _RESTRICTED_USE.split()},
    **{name.lower(): "non-commercial" for name in _NON_COMMERCIAL.split()},
}
_CREATIVE_COMMONS = re.compile(r"cc-by(-nc)?(-nd|-sa)?-(?:1\.0|2\.0|2\.1|2\.5|3\.0|4\.0)(?:-[a-z]{2,4})?")


def license_kinds(license: str) -> frozenset[Kind]:
    """The conditions of an SPDX expression. "A OR B" gives those of the milder one; "A AND B" gives both."""
    try:
        expression = Licensing().parse(license)
    except (ExpressionError, ParseError):
        return frozenset({"unknown"})
    return frozenset({"unknown"}) if expression is None else _kinds_of(expression)


def _kinds_of(expression: Any) -> frozenset[Kind]:
    if isinstance(expression, LicenseWithExceptionSymbol):
        return _kinds_of(expression.license_symbol)  # exceptions permit more, never less
    if isinstance(expression, LicenseSymbol):
        return _kinds_of_one(expression.key)
    kinds = [_kinds_of(part) for part in expression.args]
    if isinstance(expression, OR):
        return min(kinds, key=lambda kinds: max(_STRICTEST.index(kind) for kind in kinds))
    return frozenset().union(*kinds)


def _kinds_of_one(license: str) -> frozenset[Kind]:
    name = license.lower()
    if match := _CREATIVE_COMMONS.fullmatch(name):
        second: dict[str | None, Kind] = {"-nd": "no-derivatives", "-sa": "share-alike"}
        kinds: set[Kind] = {"attribution"}
        if match[1]:
            kinds.add("non-commercial")
        if match[2]:
            kinds.add(second[match[2]])
        return frozenset(kinds)
    return frozenset({_OURS.get(name) or _spdx_kinds().get(name, "unknown")})


@cache
def _spdx_kinds() -> dict[str, Kind]:
    """The kind of each SPDX id, in lower case, whose category says it."""
    kinds = {}
    for license in get_license_index():
        if (kind := _KIND_OF_CATEGORY.get(license["category"])) is not None and not license["is_exception"]:
            names = [license.get("spdx_license_key"), *license.get("other_spdx_license_keys", [])]
            kinds.update({name.lower(): kind for name in names if name})
    return kinds


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
