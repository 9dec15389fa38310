"""The judgement of a data check, and packed rows: in a terminal, as JSON, as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ft_service.data.gate import Finding, Judgement
from ft_service.data.gate.private import visible
from ft_service.data.preview import Document, PreviewRow
from ft_service.pages.page import render
from ft_service.spec.schema import DataSource
from ft_service.text import counted

_RIGHTS_MISSING = (
    "Add source and license to each source: a run stops without them. Or give --source and --license here."
)
_COLORS = {"fail": "red", "warn": "yellow", "info": "cyan", "pass": "green"}
_SHOWN_PLACES = 3


def show_judgement(name: str, judgement: Judgement, waive: Mapping[str, str], console: Console) -> None:
    """Print the verdict, the figures, and every finding with its cure."""
    verdict = judgement.verdict
    console.print(f"[bold]{escape(name)}[/bold]  [bold {_COLORS[verdict]}]{verdict}[/]", highlight=False)
    for sentence in _figures(judgement):
        console.print(Padding(escape(sentence), (0, 0, 0, 2)), highlight=False)
    for finding in judgement.findings:
        console.print()
        _show(finding, waive.get(finding.code), console)
    if judgement.entropy:
        console.print()
        table = Table(
            "variety of", "different values", "entropy, bits", "most frequent", box=None, padding=(0, 2, 0, 0)
        )
        for name, entropy in judgement.entropy.items():
            table.add_row(name, f"{entropy.kinds:,}", f"{entropy.bits:.1f}", f"{entropy.largest_share:.1%}")
        console.print(Padding(table, (0, 2)))


def _figures(judgement: Judgement) -> list[str]:
    signal = judgement.signal
    sentences = [judgement.records_text, judgement.size.text]
    if signal.records:
        lost = signal.lost_tokens / (signal.tokens + signal.lost_tokens)
        sentences.append(
            f"{counted(signal.tokens, 'training token')}, {signal.loss_share:.0%} of them loss tokens; "
            f"max_seq_len cuts off {lost:.1%} of all tokens"
        )
    return sentences


def _is_in_message(finding: Finding) -> bool:
    """Whether the message names all that the places would: unused fields of one source."""
    return finding.code == "form.unused-field" and len({place.file for place in finding.places}) == 1


def _show(finding: Finding, waived: str | None, console: Console) -> None:
    color = _COLORS[finding.severity]
    console.print(
        f"  [{color}]{finding.severity:4}[/] [bold]{finding.code}[/bold]  {finding.count_text} ({finding.percent})",
        highlight=False,
    )
    for text in (finding.message, f"{finding.why} {finding.cure}", f"Waived: {waived}" if waived else ""):
        if text:
            console.print(Padding(escape(text), (0, 0, 0, 7)), highlight=False)
    for place in [] if _is_in_message(finding) else finding.places[:_SHOWN_PLACES]:
        text = ": ".join(part for part in (str(place), place.detail) if part)
        console.print(f"       [dim]{escape(text)}[/dim]", highlight=False, soft_wrap=True)


# -- rows ------------------------------------------------------------------------------------------------------------

_SPAN_STYLES = {("trained", False): "green", ("trained", True): "black on green", ("read", False): "dim"}


def show_rows(rows: Sequence[PreviewRow], console: Console) -> None:
    """Print packed rows: trained tokens in green, tokens that are only read dim, special tokens reversed."""
    for number, row in enumerate(rows, start=1):
        filled = row.tokens / row.length
        documents = counted(len(row.documents), "document")
        title = f"row {number}: {row.tokens:,} of {row.length:,} tokens ({filled:.0%}), {documents}"
        console.rule(title, align="left")
        for document in row.documents:
            console.print(_caption(document), style="bold", highlight=False, markup=False, soft_wrap=True)
            console.print(_colored(document))
    console.print(
        Text.assemble(("trained on", "green"), "  ", ("only read", "dim"), "  ", ("special token", "reverse"))
    )


def rows_as_json(rows: Sequence[PreviewRow]) -> list[dict[str, Any]]:
    """Packed rows as JSON values."""
    return [asdict(row) for row in rows]


def rows_as_page(name: str, rows: Sequence[PreviewRow]) -> str:
    """Packed rows as one HTML page."""
    return render("data_preview.html.jinja", name=name, rows=rows, caption=_caption, visible=visible)


def _caption(document: Document) -> str:
    cut = ", cut off" if document.truncated else ""
    return f"┌ {visible(document.place)}  {counted(document.tokens, 'token')}, {document.loss_tokens:,} trained on{cut}"


def _colored(document: Document) -> Text:
    text = Text()
    for span in document.spans:
        style = _SPAN_STYLES.get((span.kind, span.is_special), "reverse dim")
        text.append(visible(span.text), style=style)
    return text


def sources_as_json(sources: Sequence[DataSource]) -> list[dict[str, Any]]:
    """The settings of sources, as a spec has them, without those at their defaults."""
    return [source.model_dump(mode="json", exclude_defaults=True) for source in sources]


def show_data_section(train: Sequence[DataSource], validation: Sequence[DataSource], console: Console) -> None:
    """Print the part of a run spec that uses these sources."""
    section = {"train": sources_as_json(train)}
    if validation:
        section["validation"] = sources_as_json(validation)
    text = yaml.safe_dump({"data": section}, sort_keys=False, allow_unicode=True, width=10_000)
    console.print("\nIn a run spec:\n", highlight=False)
    console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)
    if any(source.source is None or source.license is None for source in (*train, *validation)):
        console.print(f"\n{_RIGHTS_MISSING}", highlight=False)
