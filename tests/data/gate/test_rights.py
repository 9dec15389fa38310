"""Rights by SPDX id, with their consequence; and the duties of the base."""

import pytest

from ft_service.data.gate import Source, rights
from ft_service.data.gate.rights import base_duties, check_rights, license_kinds


def of(license: str | None, source: str | None = "https://example.com") -> Source:
    return Source("data.jsonl", ("data.jsonl",), source=source, license=license)


@pytest.mark.parametrize(
    ("license", "kinds"),
    [
        ("CC0-1.0", {"free"}),
        ("MIT", {"attribution"}),
        ("apache-2.0", {"attribution"}),
        ("CC-BY-4.0", {"attribution"}),
        ("CC-BY-SA-4.0", {"attribution", "share-alike"}),
        ("cc-by-sa-3.0", {"attribution", "share-alike"}),
        ("CC-BY-NC-4.0", {"attribution", "non-commercial"}),
        ("CC-BY-NC-SA-4.0", {"attribution", "non-commercial", "share-alike"}),
        ("CC-BY-ND-4.0", {"attribution", "no-derivatives"}),
        ("CC-BY-NC-ND-4.0", {"attribution", "non-commercial", "no-derivatives"}),
        ("CC-BY-SA-3.0-DE", {"attribution", "share-alike"}),
        ("ODbL-1.0", {"share-alike"}),
        ("GPL-3.0-or-later", {"share-alike"}),
        ("GPL-2.0-only WITH Classpath-exception-2.0", {"share-alike"}),
        ("MIT OR CC-BY-NC-4.0", {"attribution"}),
        ("CC-BY-NC-4.0 OR MIT", {"attribution"}),
        ("MIT AND CC-BY-SA-4.0", {"attribution", "share-alike"}),
        ("(MIT)", {"attribution"}),
        ("MIT AND CC0-1.0 OR GPL-3.0-only", {"attribution", "free"}),  # AND binds more strongly
        ("CC-BY-NC-4.0 OR (MIT AND GPL-3.0-only)", {"attribution", "share-alike"}),
        ("(MIT OR GPL-2.0+) AND CC-BY-4.0", {"attribution"}),
        ("MIT AND", {"unknown"}),
        ("MIT/Apache-2.0", {"unknown"}),
        ("MulanPSL-2.0", {"attribution"}),
        ("EUPL-1.1", {"share-alike"}),
        ("odbl", {"share-alike"}),
        ("llama3.1 AND MIT", {"restricted-use", "attribution"}),
        ("CC-BY", {"unknown"}),
        ("LicenseRef-OWN", {"free"}),
        ("LicenseRef-Acme", {"unknown"}),
        ("other", {"unknown"}),
        ("見積書に記載", {"unknown"}),
    ],
)
def test_each_license_has_its_kinds_of_conditions(license: str, kinds: set[str]) -> None:
    assert license_kinds(license) == kinds


def test_common_licenses_have_the_kind_that_the_database_gives_them() -> None:
    for name in rights._COMMON.split():
        assert rights._OURS[name.lower()] == rights._spdx_kinds()[name.lower()]


def test_every_source_needs_an_origin_and_a_license() -> None:
    findings = check_rights([of("CC0-1.0"), of(None), of(" ", source="")])
    by_code = {finding.code: finding for finding in findings}
    assert set(by_code) == {"rights.no-license", "rights.no-source"}
    assert by_code["rights.no-license"].count == 2 and by_code["rights.no-license"].share == pytest.approx(2 / 3)
    assert {finding.severity for finding in findings} == {"fail"}


@pytest.mark.parametrize(
    ("license", "code", "word"),
    [
        ("CC-BY-NC-4.0", "rights.non-commercial", "commercial"),
        ("CC-BY-SA-4.0", "rights.share-alike", "same license"),
        ("CC-BY-ND-4.0", "rights.no-derivatives", "adaptations"),
        ("secret", "rights.unknown-license", "conditions are unknown"),
    ],
)
def test_each_kind_of_license_explains_its_consequence(license: str, code: str, word: str) -> None:
    finding = next(finding for finding in check_rights([of(license)]) if finding.code == code)
    assert word in finding.why and finding.severity == "warn" and finding.places[0].detail == license


def test_attribution_alone_is_not_a_warning() -> None:
    assert [finding.severity for finding in check_rights([of("MIT")])] == ["info"]


def test_the_base_adds_the_conditions_of_its_license() -> None:
    (finding,) = base_duties("meta-llama/Llama-3.1-8B-Instruct")
    assert finding.code == "rights.base-license" and finding.severity == "info"
    assert "Built with Llama" in finding.message
    assert base_duties("somebody/else") == []
