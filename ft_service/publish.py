"""Publishing a finished run: its record, its model card, and its folder in the registry."""

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ft_service.catalog import models
from ft_service.chat.format import ChatFormat
from ft_service.errors import FtError
from ft_service.model.base import load_tokenizer, looks_like_folder, resolve_base
from ft_service.registry.card import model_card
from ft_service.registry.registry import ADAPTER_CONFIG_FILE, AdapterRecord, Registry, content_digest
from ft_service.registry.vllm import vllm_problems
from ft_service.runs.code import code_version
from ft_service.runs.folder import EpochAdapter, Outcome, RunFolder
from ft_service.runs.metrics import read_metrics

_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def publish(run: RunFolder) -> AdapterRecord:
    """Publish the weights that the run's outcome names. Publishing the same weights again returns the same record."""
    return _publish(run, run.outcome())


def publish_epochs(run: RunFolder) -> list[EpochAdapter]:
    """Publish the adapters of the last epochs that the run has written, oldest first. Calling it again is harmless."""
    steps = run.epoch_steps()
    if not steps:
        return run.epoch_adapters()
    outcome = run.outcome()
    metrics = {one.step: one for one in read_metrics(run.storage, run.run_id)}
    published = []
    for step in steps:
        if step > outcome.steps_run or step not in metrics:
            continue  # of an attempt that had another number of steps
        changes = {
            "weights": run.epoch_folder(step),
            "steps": step,
            "final_loss": metrics[step].loss,
            "validation_loss": metrics[step].validation_loss,
        }
        record = _publish(run, outcome.model_copy(update=changes))
        published.append(EpochAdapter(step=step, adapter=record.id))
    run.write_epoch_adapters(published)
    return published


def _publish(run: RunFolder, outcome: Outcome) -> AdapterRecord:
    plan = run.plan()
    spec = plan.spec
    base = spec.model.base
    verdict, waivers = run.data_check()
    template_digest, end_of_turn_ids = _chat_facts(base, spec.model.revision)
    draft: dict[str, object] = {
        "kind": "model" if spec.method.type == "full" else "adapter",
        "run_id": run.run_id,
        "run_name": spec.name,
        "plan_digest": plan.digest,
        "base": {
            "id": str(Path(base).expanduser().absolute()) if looks_like_folder(base) else base,
            "revision": spec.model.revision,
            "short_name": plan.base_short_name,
            "fingerprint": outcome.base_fingerprint,
        },
        "method": {"type": "full"} if spec.method.type == "full" else spec.method.model_dump(mode="json"),
        "datasets": [source.model_dump(mode="json") for source in run.sources()],
        "dataset_digest": plan.dataset.digest,
        "data_verdict": verdict,
        "waivers": [waiver.model_dump(mode="json") for waiver in waivers],
        "steps": outcome.steps,
        "extensions": [extension.model_dump(include={"step", "num_steps"}) for extension in plan.extensions],
        "final_loss": outcome.final_loss,
        "validation_loss": outcome.validation_loss,
        "chat_template_digest": template_digest,
        "end_of_turn_ids": end_of_turn_ids,
        "packages": _packages(),
    }
    registry = Registry(run.storage)
    weights = f"{run.path}/{outcome.weights}"
    if spec.method.type != "full":
        draft["vllm_problems"] = vllm_problems(run.storage.read_json(f"{weights}/{ADAPTER_CONFIG_FILE}"))
    card = model_card(draft, models.find(spec.model.base))
    if spec.method.type == "full":
        return registry.publish_stored(weights, draft, plan.base_short_name, card)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "content")
        # Do not use the shared cache: a restarted run writes other weights to the same path.
        shutil.copytree(run.storage.local_folder(weights, Path(temporary, "fetched")), folder)
        return registry.publish(folder, draft, plan.base_short_name, card)


def _chat_facts(base: str, revision: str | None) -> tuple[str, list[int]]:
    tokenizer = load_tokenizer(resolve_base(base, revision, weights=False))
    try:
        chat = ChatFormat(tokenizer)
    except FtError:  # a base without Llama 3's chat tokens, for plain text
        return content_digest({}), [tokenizer.eos_token_id]
    return chat.template_digest, list(chat.end_of_turn_ids)


def _packages() -> dict[str, str]:
    versions = {"ft-service": code_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
