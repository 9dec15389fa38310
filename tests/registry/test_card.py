"""The model card contains what people, the hub and the registry need."""

import ast
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ft_service.catalog import models
from ft_service.registry.card import merged_card, model_card
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage


def draft(**changes: Any) -> dict[str, Any]:
    base = changes.pop("base", {})
    return {
        "kind": "adapter",
        "run_id": "support-bot-1",
        "run_name": "support-bot",
        "plan_digest": "1" * 64,
        "base": {
            "id": "meta-llama/Llama-3.1-8B-Instruct",
            "revision": None,
            "short_name": "llama-3.1-8b-instruct",
            "fingerprint": "2" * 64,
            **base,
        },
        "method": {"type": "lora", "lora_rank": 16, "target_modules": "all-linear"},
        "datasets": [
            {
                "path": "hub:org/tickets:main:train",
                "source": "https://example.com",
                "license": "CC0-1.0",
                "records": 1200,
                "digest": "",
            },
            {"path": "data/own.jsonl", "source": None, "license": None, "records": 30, "digest": ""},
        ],
        "dataset_digest": "3" * 64,
        "data_verdict": "pass",
        "waivers": [],
        "steps": 1250,
        "final_loss": 1.25,
        "validation_loss": 1.5,
        "chat_template_digest": "4" * 64,
        "end_of_turn_ids": [128009],
        "packages": {"torch": "2.13.0"},
        **changes,
    }


def card_of(record_draft: dict[str, Any]) -> str:
    return model_card(record_draft, models.find(record_draft["base"]["id"]))


def front_matter(card: str) -> dict[str, Any]:
    _, fields, _ = card.split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(fields)
    return loaded


def code_block(card: str, language: str) -> str:
    block = re.search(rf"```{language}\n(.*?)\n```", card, re.DOTALL)
    assert block
    return block[1]


def table_rows(card: str, heading: str) -> list[list[str]]:
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_front_matter_has_base_license_and_datasets() -> None:
    assert front_matter(card_of(draft())) == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "llama3.1",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "fine-tuned", "lora"],
        "datasets": ["org/tickets"],
    }


def test_a_full_fine_tune_is_a_standalone_model() -> None:
    card = card_of(draft(kind="model", method={"type": "full"}))
    fields = front_matter(card)
    assert (fields["library_name"], fields["base_model_relation"]) == ("transformers", "finetune")
    assert "peft" not in code_block(card, "python") and "All weights were trained" in card


@pytest.mark.parametrize("facts", models.MODELS, ids=lambda facts: facts.short_name)
def test_title_and_notices_follow_the_license(facts: models.ModelFacts) -> None:
    card = card_of(draft(base={"id": facts.id, "short_name": facts.short_name}))
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title.removeprefix("# ").startswith(facts.license.naming_prefix)
    assert facts.license.attribution in card
    assert f"**{facts.license.display}**" in card
    assert facts.license.text_url in card and facts.license.acceptable_use_url in card


def test_the_license_of_an_unknown_base_is_unknown() -> None:
    card = card_of(draft(base={"id": "/models/mine", "short_name": "mine"}))
    assert front_matter(card)["license"] == "unknown"
    assert "# mine: support-bot" in card and "Look up that license" in card
    assert "Meta" not in card


def test_missing_source_and_license_are_not_stated() -> None:
    assert table_rows(card_of(draft()), "Data") == [
        ["hub:org/tickets:main:train", "https://example.com", "CC0-1.0", "1,200"],
        ["data/own.jsonl", "not stated", "not stated", "30"],
    ]


def test_the_card_has_the_figures_of_the_run() -> None:
    values = dict(table_rows(card_of(draft(validation_loss=None)), "Training"))
    assert values["Method"] == (
        'A LoRA adapter was trained on the frozen base: lora_rank 16, target_modules "all-linear"'
    )
    assert values["Optimizer steps"] == "1,250"
    assert values["Training loss of the last step"] == "1.2500 nats per loss token"
    assert values["Validation loss of these weights"] == "not measured"
    assert values["Packages"] == "torch 2.13.0"


def test_the_snippets_are_valid_python_and_a_chat_request() -> None:
    card = card_of(draft(base={"revision": "abc"}))
    code = code_block(card, "python")
    ast.parse(code)
    assert code.count('revision="abc"') == 2
    words = shlex.split(code_block(card, "bash").replace("\\\n", " "))
    request = json.loads(words[words.index("-d") + 1])
    assert request == {"model": "{id}", "messages": [{"role": "user", "content": "Hello"}]}


def test_the_adapters_card_loads_its_own_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "{id}").mkdir()
    (tmp_path / "{id}/chat_template.jinja").write_text("its own")
    monkeypatch.chdir(tmp_path)
    lines = code_block(card_of(draft()), "python").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("with open"))
    tokenizer = SimpleNamespace(chat_template="of the base")
    exec("\n".join(lines[first : first + 2]), {"tokenizer": tokenizer})
    assert tokenizer.chat_template == "its own"


def test_the_card_of_a_merged_model_describes_that_model() -> None:
    record = draft(id="llama-bot-12345678", digest="12345678" * 8)
    card = merged_card(record, models.find(record["base"]["id"]), "merged {id}")
    fields = front_matter(card)
    assert (fields["library_name"], fields["base_model_relation"]) == ("transformers", "finetune")
    assert "with the LoRA adapter `llama-bot-12345678` merged into its weights" in card
    assert "Content digest of the adapter: `12345678" in card
    assert "peft" not in card and "curl" not in card
    ast.parse(code_block(card, "python"))
    assert ast.literal_eval(code_block(card, "python").split("from_pretrained(")[-1].rstrip(")")) == "merged {id}"
    values = dict(table_rows(card, "Training"))
    assert values["Method"].endswith("and then merged into the base in bf16")
    assert "Validation loss of the adapter" in values


def test_user_text_is_escaped() -> None:
    path = "data/{id}|{digest}\n<b>.jsonl"
    sources = [{"path": path, "source": "`{id}`", "license": None, "records": 1, "digest": ""}]
    hostile = draft(datasets=sources, run_name="{id}", base={"id": "/models/mine", "revision": "{digest}"})
    card = card_of(hostile)
    plain = card_of(draft(base={"id": "/models/mine", "revision": "r"}))
    assert card.count("{id}") == plain.count("{id}") and card.count("{digest}") == plain.count("{digest}")
    assert len(table_rows(card, "Data")) == 1 and len(table_rows(card, "Data")[0]) == 4
    assert "<b>" not in card
    ast.parse(code_block(card, "python"))


def test_a_published_card_names_its_adapter(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "adapter_model.safetensors").write_bytes(b"weights")
    registry = Registry(Storage(str(tmp_path / "storage")))
    record = registry.publish(weights, draft(), "llama-3.1-8b-instruct", card_of(draft()))
    published = (registry.folder(record) / "README.md").read_text(encoding="utf-8")
    assert f'PeftModel.from_pretrained(base, "{record.id}")' in published
    assert record.digest in published
    assert "{id}" not in published and "{digest}" not in published
