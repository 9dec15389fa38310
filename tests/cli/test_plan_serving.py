"""`ft plan --serve`: a table of what GPUs hold, and a refusal of what cannot fit."""

import json

import pytest
from typer.testing import CliRunner

from ft_service.catalog.gpus import find_gpu
from ft_service.cli.app import app
from ft_service.cli.plan_serving import show_serving_plan
from ft_service.errors import ModelError, UsageError
from ft_service.plan.table import shape_of
from serve.fit import plan_base
from serve.settings import BaseSettings
from tests.hosts import ROOT

H100 = find_gpu("H100")


def test_a_model_on_a_card_shows_weights_cache_and_adapters(capsys):
    show_serving_plan("meta-llama/Llama-3.1-8B-Instruct", H100, None, None, as_json=True)
    plan = json.loads(capsys.readouterr().out)["llama-3.1-8b-instruct"]
    assert plan["fits"] and plan["cache_tokens"] > 400_000 and plan["num_adapters"] == 51
    show_serving_plan("meta-llama/Llama-3.1-8B-Instruct", H100, None, None, as_json=False)
    assert "51" in capsys.readouterr().out.split()


def test_a_base_of_vllm_is_planned_with_its_own_slots():
    def slots(rank: int) -> int:
        base = BaseSettings(base="meta-llama/Llama-3.1-8B-Instruct", engine="vllm", max_lora_rank=rank)
        return plan_base(base, shape_of(base.base), 79.1).num_adapters

    assert (slots(8), slots(64)) == (64, 11)  # at most max_batch


def test_every_base_of_the_shipped_config_fits_eight_h100(capsys):
    show_serving_plan(str(ROOT / "serve/config.yaml"), H100, None, None, as_json=False)
    shown = capsys.readouterr().out
    assert "llama-3.1-8b-instruct" in shown and "llama-3.3-70b-instruct" in shown


def test_what_cannot_fit_is_refused_with_a_cure(capsys):
    with pytest.raises(UsageError, match="nf4"):
        show_serving_plan("meta-llama/Llama-3.3-70B-Instruct", H100, None, None, as_json=False)
    assert "no room" in capsys.readouterr().out


def test_more_gpus_make_room_and_the_command_takes_them():
    command = ["--serve", "meta-llama/Llama-3.3-70B-Instruct", "--gpu-type", "H100", "--gpus", "4", "--json"]
    done = CliRunner().invoke(app, ["plan", *command])
    assert json.loads(done.stdout)["llama-3.3-70b-instruct"]["fits"]
    with pytest.raises(UsageError, match="--nodes = 2: no effect with --serve"):
        CliRunner().invoke(app, ["plan", *command[:4], "--nodes", "2"], catch_exceptions=False)


def test_a_plan_needs_a_known_model_and_a_gpu():
    with pytest.raises(UsageError, match="--gpu-type"):
        show_serving_plan("meta-llama/Llama-3.1-8B-Instruct", None, None, None, as_json=False)
    with pytest.raises(ModelError):
        show_serving_plan("nobody/nothing", H100, None, None, as_json=False)


def test_a_config_with_full_templates_says_what_their_models_take(tmp_path, capsys):
    config = (ROOT / "serve/config.yaml").read_text()
    show_serving_plan(str(ROOT / "serve/config.yaml"), H100, None, None, as_json=False)
    assert "full job" not in capsys.readouterr().out
    changed = config.replace("method: {type: qlora, lora_rank: 16, lora_alpha: 32}", "method: {type: full}")
    (tmp_path / "config.yaml").write_text(changed)
    show_serving_plan(str(tmp_path / "config.yaml"), H100, None, None, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "a full job of llama-3.1-8b-instruct makes is a base too: it takes what its parent takes" in shown
