"""The model card of a published adapter or model: README.md in the format of the Hugging Face hub.

The text keeps the placeholders ``{id}`` and ``{digest}``, which `Registry.publish` replaces.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ft_service.catalog.models import ModelFacts

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_DATASET = "hub:"
_NOT_STATED = "not stated"
_METHODS = {
    "full": "All weights were trained",
    "lora": "A LoRA adapter was trained on the frozen base",
    "qlora": "A LoRA adapter was trained on the frozen base, held in 4 bits (NF4)",
}


_MERGED = "merged"
"""Kind of a draft whose adapter is merged into the base; it is not published."""


def merged_card(record: Mapping[str, Any], facts: ModelFacts | None, folder_name: str) -> str:
    """The card of the model that an adapter and its base were merged into. `record` is the adapter's, as JSON values.

    Sizes and digests of the merged weights are not part of it: it describes how they came about.
    """
    card = model_card({**record, "kind": _MERGED, "folder": folder_name}, facts)
    return card.replace("{id}", record["id"]).replace("{digest}", record["digest"])


def model_card(record_draft: Mapping[str, Any], facts: ModelFacts | None) -> str:
    """The card in Markdown. `record_draft` is that of `Registry.publish`; `facts` is None for an unknown base."""
    sections = [
        _front_matter(record_draft, facts),
        _what_it_is(record_draft, facts),
        _use(record_draft),
        _training(record_draft),
        _data(record_draft),
        _license(record_draft, facts),
        _limits(),
    ]
    return "\n\n".join(sections) + "\n"


def card_for_hub(card: str) -> str:
    """A card that the hub accepts: without the base in its metadata if that is no hub id (a folder, a URI)."""
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    if _HUB_ID.fullmatch(str(fields.get("base_model", ""))):
        return card
    fields = {name: value for name, value in fields.items() if name not in ("base_model", "base_model_relation")}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n{body}"


def _front_matter(draft: Mapping[str, Any], facts: ModelFacts | None) -> str:
    is_adapter = draft["kind"] == "adapter"
    hub_datasets = [
        source["path"].removeprefix(_HUB_DATASET).partition(":")[0]
        for source in draft["datasets"]
        if source["path"].startswith(_HUB_DATASET)
    ]
    fields: dict[str, object] = {
        "base_model": draft["base"]["id"],
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "library_name": "peft" if is_adapter else "transformers",
        "license": facts.license.id if facts else "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "fine-tuned", draft["method"]["type"]],
    }
    if hub_datasets:
        fields["datasets"] = hub_datasets
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _what_it_is(draft: Mapping[str, Any], facts: ModelFacts | None) -> str:
    base = draft["base"]
    title = facts.title if facts else base["short_name"]
    revision = f", revision {_plain(base['revision'])}" if base["revision"] else ""
    about = f"{_plain(base['id'])}{revision}"
    sentences = {
        "adapter": f"A LoRA adapter for {about}, published as `{{id}}`.",
        "model": f"A full fine-tune of {about}, published as `{{id}}`.",
        _MERGED: f"A complete model in bf16: {about}, with the LoRA adapter `{{id}}` merged into its weights.",
    }
    digest = "Content digest of the adapter" if draft["kind"] == _MERGED else "Content digest"
    return "\n".join(
        [
            f"# {_plain(title)}: {_plain(draft['run_name'])}",
            "",
            sentences[draft["kind"]],
            "",
            f"{digest}: `{{digest}}` (SHA-256; the id ends with its first 8 digits). "
            f"Base fingerprint: `{base['fingerprint']}`.",
            *(["", f"**{facts.license.display}**"] if facts else []),
        ]
    )


def _use(draft: Mapping[str, Any]) -> str:
    base_id = _literal(draft["base"]["id"])
    revision = draft["base"]["revision"]
    at_revision = f", revision={_literal(revision)}" if revision else ""
    if draft["kind"] == "adapter":
        load = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base_id}{at_revision}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({base_id}{at_revision})
with open("{{id}}/chat_template.jinja", encoding="utf-8") as template:
    tokenizer.chat_template = template.read()  # of the training; that of the base may differ
model = PeftModel.from_pretrained(base, "{{id}}")  # the folder with this card"""
    elif draft["kind"] == _MERGED:
        folder = _literal(draft["folder"])
        load = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, dtype="auto")  # the folder with this card
tokenizer = AutoTokenizer.from_pretrained({folder})"""
        return f"## Load it\n\n```python\n{load}\n```"
    else:
        load = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{id}", dtype="auto")  # the folder with this card
tokenizer = AutoTokenizer.from_pretrained("{id}")"""
    return f"""\
## Load it

```python
{load}
```

## Send a request

```bash
curl http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" -H "Authorization: Bearer $FT_API_KEY" \\
  -d '{{"model": "{{id}}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
```"""


def _training(draft: Mapping[str, Any]) -> str:
    method = draft["method"]
    settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in method.items() if name != "type")
    validation_loss = draft["validation_loss"]
    merged = ", and then merged into the base in bf16" if draft["kind"] == _MERGED else ""
    rows = [
        ("Method", _METHODS[method["type"]] + (f": {settings}" if settings else "") + merged),
        ("Optimizer steps", f"{draft['steps']:,}"),
        *(
            (
                "Planned steps changed",
                f"at step {extension['step']:,}; {extension['num_steps']:,} steps were planned before",
            )
            for extension in draft.get("extensions", ())
        ),
        ("Training loss of the last step", f"{draft['final_loss']:.4f} nats per loss token"),
        *(("Cannot be served by vLLM", problem) for problem in draft.get("vllm_problems", ()) if not merged),
        (
            "Validation loss of the adapter" if merged else "Validation loss of these weights",
            "not measured" if validation_loss is None else f"{validation_loss:.4f} nats per loss token",
        ),
        ("Run", draft["run_id"]),
        ("Plan digest", draft["plan_digest"]),
        ("Chat template digest", draft["chat_template_digest"]),
        ("End-of-turn token ids", ", ".join(str(token) for token in draft["end_of_turn_ids"])),
        ("Packages", ", ".join(f"{name} {version}" for name, version in draft["packages"].items())),
    ]
    return "## Training\n\n" + _table(("What", "Value"), rows)


def _data(draft: Mapping[str, Any]) -> str:
    rows = [
        (source["path"], source["source"] or _NOT_STATED, source["license"] or _NOT_STATED, f"{source['records']:,}")
        for source in draft["datasets"]
    ]
    table = _table(("Path", "Source", "License", "Records"), rows)
    parts = [
        f"## Data\n\n{table}\n\nDigest of the prepared dataset: `{draft['dataset_digest']}`. "
        f"Data check: {draft['data_verdict']}."
    ]
    if accepted := draft["waivers"]:
        rows = [(waiver["code"], waiver["severity"], f"{waiver['count']:,}", waiver["reason"]) for waiver in accepted]
        parts.append("Accepted findings of the data check:\n\n" + _table(("Code", "Severity", "Count", "Reason"), rows))
    return "\n\n".join(parts)


def _license(draft: Mapping[str, Any], facts: ModelFacts | None) -> str:
    if facts is None:
        return (
            "## License\n\n"
            f"The license of {_plain(draft['base']['id'])} is not known to this project. Look up that license and its "
            "terms for derived models before you distribute this one."
        )
    terms = facts.license
    duties = "\n".join(f"- {duty}" for duty in terms.duties)
    return (
        "## License\n\n"
        f"The base is licensed under the [{terms.name}]({terms.text_url}). A summary of its terms (only the license "
        "text counts):\n\n"
        f"{duties}\n\nThe licenses of the data above also apply."
    )


def _limits() -> str:
    return (
        "## Limits\n\n"
        "The figures above only measure how well the model fits the training data. Before relying on this model, let "
        "people compare its answers with those of the base on prompts from the intended use. Errors of the base and "
        "errors in the data can appear in the answers."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _literal(text: str) -> str:
    """A Python string literal that cannot contain a placeholder of the registry."""
    return json.dumps(text).replace("{", r"\u007b")


def _plain(text: str) -> str:
    """Escapes user text: it ends no table cell, opens no HTML tag, and contains no placeholder of the registry."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("{", "&#123;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return " ".join(text.split())
