"""From a job to a run spec: epochs by the cookbook's rule, batches in rows, names, templates that are refused early."""

from typing import Any

import pytest
import yaml

from ft_service.errors import UsageError
from ft_service.plan.facts import DatasetFacts
from serve.fine_tuning.run_spec import (
    Hyperparameters,
    JobSettings,
    auto_epochs,
    batch_rows,
    model_name,
    resolved_spec,
    run_name,
    unresolved_spec,
)
from serve.fine_tuning.templates import with_templates_read
from serve.settings import ServeSettings
from tests.hosts import ROOT

TEMPLATE: dict[str, Any] = {"model": {"base": "org/tiny"}, "train": {"global_batch_size": 8}}


def job(**changes: Any) -> JobSettings:
    values = {
        "name": "tiny",
        "seed": 2**32 + 5,
        "hyperparameters": Hyperparameters(),
        "training": "/data/train",
        "validation": None,
        "source": "file-1, uploaded by anna",
        "license": "CC0-1.0",
        "waive": {},
        "wandb": None,
    }
    return JobSettings(**{**values, **changes})


def facts(examples: int, rows: int) -> DatasetFacts:
    return DatasetFacts(
        digest="d", conversations=examples, rows=rows, tokens=100 * rows, loss_tokens=10 * rows, truncated=0
    )


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [(1, 25), (4, 25), (10, 10), (33, 3), (34, 3), (100, 3), (8_333, 3), (8_334, 2), (12_501, 1), (10**6, 1)],
)
def test_epochs_follow_the_rule_of_the_cookbook(examples, epochs):
    assert auto_epochs(examples) == epochs


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro", "rows"),
    [
        ("auto", 1, "auto", 4),  # a tenth of the rows, which is less than the template's 24
        ("auto", 4, "auto", 4),
        ("auto", 3, "auto", 3),
        (1, 1, "auto", 1),
        (8, 1, "auto", 4),  # two examples a row
        (8, 3, "auto", 3),
        (256, 2, 4, 128),
    ],
)
def test_a_batch_of_examples_becomes_rows_that_the_workers_can_share(batch_size, workers, micro, rows):
    template = {
        **TEMPLATE,
        "train": {"global_batch_size": 24, "micro_batch_size": micro},
        "parallel": {"num_workers": workers},
    }
    spec = unresolved_spec(template, job(), "/storage", "job")
    assert batch_rows(spec, batch_size, facts(80, 40)) == rows


def test_a_job_changes_its_template_and_nothing_else():
    template = {
        "model": {"base": "org/tiny"},
        "method": {"type": "lora", "lora_rank": 8},
        "data": {"max_seq_len": 512, "waive": {"size.small": "known"}},
        "train": {"learning_rate": 1e-3, "max_steps": 10, "global_batch_size": 8},
        "report": {"trackers": ["tensorboard"]},
    }
    asked = job(
        hyperparameters=Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=0.5),
        validation="/data/valid",
        waive={"size.too-few": "a test"},
        wandb={"project": "mine", "entity": "acme", "name": "first try", "tags": ["a", "b"]},
    )
    found = resolved_spec(unresolved_spec(template, asked, "/storage", "job"), asked, facts(80, 40), "job")
    spec = found.spec
    assert (spec.train.epochs, spec.train.max_steps, spec.train.learning_rate) == (2.0, None, 5e-4)
    assert spec.train.global_batch_size == 2 and spec.train.seed == 5
    assert spec.method.lora_rank == 8 and spec.data.max_seq_len == 512
    assert spec.data.waive == {"size.small": "known", "size.too-few": "a test"}
    assert [(one.path, one.format) for one in (*spec.data.train, *spec.data.validation)] == [
        ("/data/train", "chat"),
        ("/data/valid", "chat"),
    ]
    assert spec.report.trackers == ["tensorboard", "wandb"] and spec.report.project == "mine"
    assert (spec.report.entity, spec.report.run_name, spec.report.tags) == ("acme", "first try", ["a", "b"])
    assert found.hyperparameters == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    assert template["train"] == {"learning_rate": 1e-3, "max_steps": 10, "global_batch_size": 8}


def test_what_a_job_leaves_open_is_the_templates():
    template = {**TEMPLATE, "train": {"max_steps": 10, "global_batch_size": 8}}
    found = resolved_spec(unresolved_spec(template, job(), "/storage", "job"), job(), facts(80, 40), "job")
    assert found.spec.train.max_steps == 10 and found.spec.train.learning_rate is None
    assert found.hyperparameters == {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1.0}


@pytest.mark.parametrize(
    ("suffix", "name", "model"),
    [
        ("My Model", "my-model", "ft:tiny:acme:My-Model:01234567"),
        (None, "tiny", "ft:tiny:acme::01234567"),
        ("日本語/モデル", "tiny", "ft:tiny:acme::01234567"),
        ("a/b:c", "a-b-c", "ft:tiny:acme:a-b-c:01234567"),
        ("x" * 64, "x" * 30, f"ft:tiny:acme:{'x' * 64}:01234567"),
    ],
)
def test_names_come_from_the_suffix(suffix, name, model):
    assert run_name(suffix, "tiny") == name
    assert model_name("tiny", "acme", suffix, "0123456789ab") == model


def settings(template: object, name: str = "tiny") -> ServeSettings:
    return ServeSettings.model_validate(
        {"storage": "/s", "bases": [{"base": "org/Tiny"}], "fine_tuning": {"templates": {name: template}}}
    )


@pytest.mark.parametrize(
    ("template", "name", "part"),
    [
        ({}, "other", "is no base of this server"),
        ({"train": {"epoch": 3}}, "tiny", "train.epoch"),
        ({"data": {"train": [{"path": "x"}]}}, "tiny", "has data.train"),
        ({"method": {"type": "full", "lora_rank": 4}}, "tiny", "method.lora_rank"),
        ("/nowhere/template.yaml", "tiny", "cannot be read"),
    ],
)
def test_a_template_that_no_job_could_use_is_refused_before_the_server_starts(template, name, part):
    with pytest.raises(UsageError) as error:
        with_templates_read(settings(template, name))
    assert f"fine_tuning.templates.{name}" in str(error.value) and part in str(error.value)


def test_a_full_template_publishes_its_final_model_only():
    template = with_templates_read(settings({"method": {"type": "full"}})).fine_tuning.templates["tiny"]
    job = JobSettings("a", 0, Hyperparameters(), "training.jsonl", None, "an upload", "CC0-1.0", {}, None)
    assert unresolved_spec(template, job, "/s", "here").checkpoint.publish_epochs == 0
    assert unresolved_spec({**template, "method": {"type": "lora"}}, job, "/s", "here").checkpoint.publish_epochs == 3


def test_templates_are_read_from_files_and_know_their_base(tmp_path):
    file = tmp_path / "template.yaml"
    file.write_text("train: {global_batch_size: 4}")
    tuning = with_templates_read(settings(str(file))).fine_tuning
    assert tuning.templates == {"tiny": {"train": {"global_batch_size": 4}, "model": {"base": "org/Tiny"}}}


def test_the_shipped_templates_can_be_used():
    content = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    read = with_templates_read(ServeSettings.model_validate(content["applications"][0]["args"]))
    assert list(read.fine_tuning.templates) == ["llama-3.1-8b-instruct"]
