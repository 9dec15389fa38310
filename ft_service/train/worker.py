"""One worker of a run, from plan to weights on storage. Needs a process group's environment, and neither Ray nor a cluster.

``torchrun --nproc-per-node 2 -m ft_service.train.worker STORAGE RUN_ID`` trains a prepared run without Ray.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from ft_service.chat import ChatFormat
from ft_service.data.prepare import PreparedDataset, open_dataset
from ft_service.errors import FtError
from ft_service.metrics import EventLog, JsonlSink, ProgressLine, StepMetrics, TensorBoardSink
from ft_service.model.adapter import attach_adapter, changes_base, export_adapter
from ft_service.model.base import fingerprint, load_base, load_tokenizer, resolve_base
from ft_service.model.export import export_model
from ft_service.plan import RunPlan
from ft_service.runs import Outcome, RunFolder
from ft_service.storage import Storage
from ft_service.train.batches import Batches
from ft_service.train.loop import Hooks, TrainingState, train
from ft_service.train.loss import LossModel
from ft_service.train.parallel import Parallel, init_process_group

Report = Callable[[StepMetrics], None]


def run_worker(storage_root: str, run_id: str, report: Report = lambda metrics: None) -> None:
    """Train the run whose plan and dataset lie on storage, and write its outcome there.

    Every worker of the process group calls this; `report` is called on each of them after each validation and at the end.
    """
    run = RunFolder(Storage(storage_root), run_id)
    plan = run.plan()
    init_process_group(plan.spec.parallel.use_gpu)
    torch.set_num_threads(plan.spec.parallel.cpus_per_worker)
    parallel = Parallel(plan)
    dataset = open_dataset(run.storage, plan.dataset.digest)
    base_folder = resolve_base(plan.spec.model.base, plan.spec.model.revision)

    trained = Trained(plan, parallel, base_folder)
    weights = WeightsOnStorage(run, trained, parallel)
    sinks = _sinks(run, plan) if parallel.is_first else []

    def on_step(metrics: StepMetrics) -> None:
        for sink in sinks:
            sink(metrics)
        if metrics.validation_loss is not None or metrics.step == plan.num_steps:
            report(metrics)

    state = train(
        plan,
        parallel,
        _batches(plan, parallel, dataset.train),
        _batches(plan, parallel, dataset.validation) if dataset.validation is not None else None,
        Hooks(on_step=on_step, on_best=weights.keep, on_checkpoint=lambda state: None),
        TrainingState(),
    )
    if state.best_step is None:
        weights.keep(state)
    if parallel.is_first:
        run.write_outcome(
            Outcome(
                weights=weights.place,
                steps=state.best_step or state.step,
                steps_run=state.step,
                final_loss=state.loss,
                validation_loss=state.best_validation_loss if state.best_step else None,
                stopped_early=state.stopped_early,
                base_fingerprint=fingerprint(base_folder),
            )
        )
        for sink in sinks:
            sink.close()
    parallel.barrier()
    parallel.close()


class Trained:
    """The model in training: the base, what is trained of it, and how that is written to a folder."""

    def __init__(self, plan: RunPlan, parallel: Parallel, base_folder: Path) -> None:
        method, spec = plan.spec.method, plan.spec
        self._base_folder = base_folder
        self._template = chat_template(base_folder)
        # Adapters start alike on all workers; dropout then differs between them.
        torch.manual_seed(spec.train.seed)
        with parallel.partitioned_init():
            causal_lm = load_base(
                base_folder,
                dtype=parallel.dtype,
                four_bit=method.type == "qlora",
                device=parallel.device,
                partitioned=plan.zero_stage == 3,
            )
            self._model: LlamaForCausalLM | PeftModel = causal_lm
            if method.type != "full":
                self._model = attach_adapter(causal_lm, method, spec.model.base, spec.model.revision)
        self._initial = self._adapter_weights() if changes_base(method) else None
        if plan.activation_checkpointing:
            causal_lm.gradient_checkpointing_enable()
        causal_lm.train()
        parallel.wrap(LossModel(self._model, causal_lm))
        torch.manual_seed(spec.train.seed + parallel.rank)

    def _adapter_weights(self) -> dict[str, torch.Tensor]:
        named = self._model.named_parameters()
        return {name: parameter.detach().cpu().clone() for name, parameter in named if parameter.requires_grad}

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write gathered `weights` as what gets published: a PEFT adapter folder or a model folder."""
        if isinstance(self._model, PeftModel):
            export_adapter(self._model, weights, self._initial, folder, self._template)
        else:
            export_model(self._model, weights, self._base_folder, folder, self._template)


class WeightsOnStorage:
    """Keeps one set of weights of the run on storage: the last one given."""

    def __init__(self, run: RunFolder, trained: Trained, parallel: Parallel) -> None:
        self._run, self._trained, self._parallel = run, trained, parallel
        self.place = ""

    def keep(self, state: TrainingState) -> None:
        gathered = self._parallel.gather_trained()
        if self._parallel.is_first:
            before, self.place = self.place, f"weights/step-{state.step}"
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary, "weights")
                self._trained.export(gathered, folder)
                self._run.storage.put_folder(folder, f"{self._run.path}/{self.place}", marker=_marker(folder))
            if before:
                self._run.storage.delete(f"{self._run.path}/{before}")


def _marker(folder: Path) -> str:
    return next(name for name in ("adapter_config.json", "config.json") if (folder / name).is_file())


def chat_template(base_folder: Path) -> str:
    """The template that is published: Llama 3's, or '' where the tokenizer has not its special tokens."""
    try:
        return ChatFormat(load_tokenizer(base_folder)).template
    except FtError:
        return ""


def _batches(plan: RunPlan, parallel: Parallel, rows: object) -> Batches:
    return Batches(
        rows=rows,  # type: ignore[arg-type]
        seed=plan.spec.train.seed,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
    )


def _sinks(run: RunFolder, plan: RunPlan) -> list[JsonlSink | TensorBoardSink | ProgressLine]:
    sinks: list[JsonlSink | TensorBoardSink | ProgressLine] = [
        JsonlSink(run.storage, run.run_id),
        ProgressLine(plan.num_steps),
    ]
    if plan.spec.report.tensorboard:
        sinks.append(TensorBoardSink(Path(run.storage.uri(f"{run.path}/tensorboard"))))
    return sinks


if __name__ == "__main__":
    try:
        run_worker(sys.argv[1], sys.argv[2])
    except FtError as error:
        print(f"worker {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
