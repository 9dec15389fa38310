"""Planted faults: thirty-six small ways to break the product, and the tests that must notice each of them.

    python -m tests.planted_faults --list           what there is
    python -m tests.planted_faults                  plant all of them, one after the other (about an hour on 2 cores)
    python -m tests.planted_faults NAME [NAME ...]  only these

A test suite proves something only if it fails when the product is wrong. Each fault is planted in a fresh copy of the
tracked files, and its tests run there. A test catches a fault if it passes without it and fails with it. The exit code
is 1 if a fault is not caught.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("ft_service", "serve", "jobs")

TEST_SECONDS = 1800
"""Most that the tests of one fault may take; the unplanted tests get this for each fault."""
TEAR_DOWN_SECONDS = 120
LOG_CHARACTERS = 8000

_OUTCOMES = "PLANTED_FAULTS_OUTCOMES"
"""Environment variable: the file to which pytest, with this module as its plugin, writes the outcome of each test."""


@dataclass(frozen=True)
class Fault:
    """One way to break the product."""

    name: str
    file: str
    old: str
    """Occurs exactly once in the file."""
    new: str
    breaks: str
    """What the fault breaks for a user."""
    tests: tuple[str, ...]
    """Node ids, with or without parameters, of the cheapest tests that catch it."""


FAULTS: tuple[Fault, ...] = (
    # -- spec and data -----------------------------------------------------------------------------------------------
    Fault(
        name="batch-not-divisible",
        file="ft_service/spec/schema.py",
        old="self.train.global_batch_size % (rows * count) == 0",
        new="self.train.global_batch_size % count == 0",
        breaks="A spec whose global batch cannot be split into its micro-batches is accepted.",
        tests=("tests/spec/test_spec.py::test_a_contradiction_names_setting_and_fix",),
    ),
    Fault(
        name="changed-data-unnoticed",
        file="ft_service/data/files/shard.py",
        old="if digest != shard.digest:",
        new="if not digest:",
        breaks="A data file that changes while a run reads it is trained on under the digest of the old content.",
        tests=("tests/data/test_read.py::test_a_file_that_changes_after_its_scan_is_refused",),
    ),
    Fault(
        name="end-of-turn-untrained",
        file="ft_service/chat/format.py",
        old="[message.is_trained] * len(body)",
        new="[message.is_trained] * (len(body) - 1) + [False]",
        breaks="The end-of-turn token gets no loss, so the adapter never learns to stop.",
        tests=("tests/chat/test_format.py::test_only_answers_and_their_end_of_turn_are_trained",),
    ),
    Fault(
        name="exact-fit-wasted",
        file="ft_service/data/pack.py",
        old="bisect_left(rooms, length)",
        new="bisect_left(rooms, length + 1)",
        breaks="An example that would fill a row exactly goes elsewhere, so rows are emptier and training is slower.",
        tests=("tests/data/test_pack.py::test_an_example_goes_into_the_fullest_row_with_room",),
    ),
    Fault(
        name="short-question-leaks",
        file="ft_service/data/gate/leakage.py",
        old="np.where(totals < FEW_GRAMS, 1.0, OVERLAP)",
        new="OVERLAP",
        breaks="Short questions that differ from an evaluation item in one word are reported as leaked.",
        tests=("tests/data/gate/test_leakage.py::test_short_questions_that_differ_in_one_word_are_different",),
    ),
    # -- plan --------------------------------------------------------------------------------------------------------
    Fault(
        name="last-step-missing",
        file="ft_service/plan/make.py",
        old="math.ceil(epochs * num_rows / spec.train.global_batch_size)",
        new="math.floor(epochs * num_rows / spec.train.global_batch_size)",
        breaks="The last rows of the last epoch are never trained on.",
        tests=("tests/plan/test_plan.py::test_steps_cover_the_epochs_or_equal_max_steps",),
    ),
    Fault(
        name="padding-not-counted",
        file="ft_service/plan/partitions.py",
        old="return _FLAT_BUFFER_ALIGNMENT * partition_numel(numel, _FLAT_BUFFER_ALIGNMENT * parts)",
        new="return partition_numel(numel, parts)",
        breaks="The memory that `ft plan` predicts for ZeRO-1 and ZeRO-2 leaves out the padding of the shards.",
        tests=("tests/plan/test_memory.py::test_persistent_memory_is_predicted_to_the_byte[2]",),
    ),
    # -- storage and lease -------------------------------------------------------------------------------------------
    Fault(
        name="full-disk-waited-for",
        file="ft_service/storage/failures.py",
        old="errno.EINVAL,\n    errno.ENOSPC,",
        new="errno.EINVAL,",
        breaks="A full disk is taken for a network that is away: minutes of waiting before the error shows.",
        tests=("tests/storage/test_storage_faults.py::test_permanent_errors_are_raised_at_once[ENOSPC]",),
    ),
    Fault(
        name="config-written-first",
        file="ft_service/train/weights.py",
        old="key=lambda name: name == CONFIG_FILE",
        new="key=lambda name: name != CONFIG_FILE",
        breaks="A model folder counts as whole before its index and its digests are written.",
        tests=("tests/train/test_writing.py::test_each_worker_writes_its_file_and_config_comes_last[2-zero3]",),
    ),
    Fault(
        name="lease-runs-out",
        file="ft_service/runs/lease.py",
        old="RENEW_SECONDS = 10.0",
        new="RENEW_SECONDS = 600.0",
        breaks="A second driver takes a living driver for dead, and takes its run away.",
        # Tests on a cluster renew their leases more often, so they cannot see it.
        tests=("tests/runs/test_lease.py::test_a_lease_outlives_two_renewals_that_fail",),
    ),
    # -- checkpoints -------------------------------------------------------------------------------------------------
    Fault(
        name="damaged-part-resumed",
        file="ft_service/train/checkpoints/manifest.py",
        old="if digest.hexdigest() == part.sha256 else",
        new="if digest.hexdigest() else",
        breaks="A run resumes from a checkpoint with flipped bits.",
        tests=("tests/train/test_resume.py::test_damaged_checkpoint_is_reported_and_the_previous_one_used",),
    ),
    Fault(
        name="moments-of-another-worker",
        file="ft_service/train/checkpoints/resume.py",
        old="(shard.stop - shard.start) + start - shard.start)",
        new="(shard.stop - shard.start))",
        breaks="Resumed on more workers, each of them gets the first worker's weights and optimizer state.",
        tests=(
            "tests/train/test_resume.py::"
            "test_resuming_on_other_workers_gives_the_same_losses[no dropout-before1-after1]",
        ),
    ),
    # -- loading -----------------------------------------------------------------------------------------------------
    Fault(
        name="block-cut-wrongly",
        file="ft_service/model/load.py",
        old="packed[begin - first : end - first]",
        new="packed[: end - begin]",
        breaks="Under ZeRO-3, a worker whose share begins inside a 4-bit block gets weights of the share before it.",
        tests=("tests/model/test_load.py::test_shares_equal_transformers_weights_bit_for_bit[2]",),
    ),
    # -- training ----------------------------------------------------------------------------------------------------
    Fault(
        name="accumulation-divided-twice",
        file="ft_service/train/parallel.py",
        old="scale_wrt_gas=False",
        new="scale_wrt_gas=True",
        breaks="Gradients shrink with the number of accumulation steps, so the layout changes the training.",
        tests=("tests/train/test_training_proofs.py::test_every_layout_trains_the_same_full_weights",),
    ),
    Fault(
        name="same-order-every-epoch",
        file="ft_service/data/order.py",
        old="PCG64([seed, epoch])",
        new="PCG64([seed])",
        breaks="Every epoch reads the rows in the same order.",
        tests=("tests/data/test_pack.py::test_epochs_and_seeds_differ_in_order",),
    ),
    Fault(
        name="first-update-lost",
        file="ft_service/train/schedule.py",
        old="peak * (step + 1) / warmup_steps",
        new="peak * step / warmup_steps",
        breaks="The first update has a learning rate of zero, and the warm-up never reaches its peak.",
        tests=("tests/train/objectives/test_sft.py::test_warmup_rises_linearly_to_the_peak",),
    ),
    Fault(
        name="hang-of-first-worker-silent",
        file="ft_service/train/watchdog.py",
        old="is_first_to_notice = len(missing) == self._world_size",
        new="is_first_to_notice = self._rank == 0",
        breaks="When the first worker hangs, no event says so.",
        tests=("tests/train/test_watchdog.py::test_a_stopped_worker_is_the_suspect[0]",),
    ),
    Fault(
        name="infinite-gradient-applied",
        file="ft_service/train/parallel.py",
        old="if self._read_update(norm).isfinite():",
        new="if not self._read_update(norm).isnan():",
        breaks="Without ZeRO, an infinite gradient ruins weights and optimizer state before the run ends.",
        tests=("tests/train/test_nonfinite.py::test_nonfinite_gradient_changes_no_weight[1]",),
    ),
    Fault(
        name="rewound-one-step-too-far",
        file="ft_service/runs/metrics.py",
        old="metrics.step <= step",
        new="metrics.step < step",
        breaks="A resumed run loses the measurements of the step that its checkpoint was saved at.",
        tests=("tests/runs/test_metrics.py::test_a_resumed_run_has_each_step_once",),
    ),
    Fault(
        name="noise-called-overfitting",
        file="ft_service/runs/overfitting.py",
        old="if rise <= max(",
        new="if rise <= min(",
        breaks="A validation loss that only jumps up and down is reported as overfitting.",
        tests=("tests/runs/test_overfitting.py::test_a_zigzag_validation_loss_is_not_overfitting",),
    ),
    # -- a run's life ------------------------------------------------------------------------------------------------
    Fault(
        name="one-restart-fewer",
        file="ft_service/train/attempts.py",
        old="if len(deaths) > max_failures:",
        new="if len(deaths) >= max_failures:",
        breaks="A run gives up one restart before parallel.max_failures is used up.",
        tests=("tests/train/test_attempts.py::test_no_more_restarts_than_the_budget",),
    ),
    Fault(
        name="sigterm-left-to-ray",
        file="ft_service/launch.py",
        old="signals.install()",
        new="pass",
        breaks="SIGTERM, as `ray job stop` sends it, ends a run without a checkpoint.",
        tests=("tests/cluster/test_stopping.py::test_a_run_id_with_another_training_is_rejected_early",),
    ),
    Fault(
        name="failed-job-reported-done",
        file="ft_service/cluster/submit.py",
        old="if info.status == JobStatus.SUCCEEDED:",
        new="if info.status.is_terminal():",
        breaks="`ft submit` exits with 0 for a job that failed.",
        tests=("tests/jobs/test_train.py::test_ft_submit_follows_the_job_and_returns_its_exit_code",),
    ),
    Fault(
        name="wrong-usage-exits-1",
        file="ft_service/errors.py",
        old="sys.exit(error.exit_code)",
        new="sys.exit(1)",
        breaks="Scripts cannot tell a wrong spec (2) or a stopped run (3) from a failure (1).",
        tests=("tests/cli/test_plan.py::test_invalid_arguments_exit_with_code_2",),
    ),
    # -- what a run produces -----------------------------------------------------------------------------------------
    Fault(
        name="waivers-not-recorded",
        file="ft_service/publish.py",
        old='[waiver.model_dump(mode="json") for waiver in waivers]',
        new="[]",
        breaks="The adapter's record and its model card hide which findings of the data gate were accepted.",
        tests=("tests/jobs/test_train.py::test_a_waiver_is_kept_in_record_and_card",),
    ),
    Fault(
        name="nan-merged",
        file="ft_service/model/adapter.py",
        old="layer.merge(safe_merge=True)",
        new="layer.merge(safe_merge=False)",
        breaks="An adapter with NaNs is merged into a model that answers nonsense.",
        tests=("tests/model/test_merge.py::test_failed_merge_leaves_nothing",),
    ),
    Fault(
        name="exported-scale-wrong",
        file="ft_service/model/adapter.py",
        old="(2**0.5 if config.use_rslora else 2)",
        new="2",
        breaks="A PiSSA adapter trained with rsLoRA is published with 1.4 times its scale.",
        tests=(
            "tests/train/test_methods.py::"
            "test_stock_peft_reproduces_the_validation_loss_of_every_variant[pissa-rslora-2]",
        ),
    ),
    Fault(
        name="report-not-escaped",
        file="ft_service/pages/page.py",
        old="autoescape=True",
        new="autoescape=False",
        breaks="Text of a dataset runs as a script in whoever's browser opens the report.",
        tests=("tests/pages/test_run_report.py::test_content_of_a_run_is_escaped",),
    ),
    # -- serving -----------------------------------------------------------------------------------------------------
    Fault(
        name="adapter-on-another-base",
        file="serve/inference/models.py",
        old="if base.ref.fingerprint == record.base.fingerprint",
        new="if base.ref.short_name == record.base.short_name",
        breaks="An adapter that was trained on another revision of the base is served, with wrong answers.",
        tests=("tests/serve/test_service.py::test_the_404_of_an_adapter_names_its_base",),
    ),
    Fault(
        name="base-answers-for-unknown",
        file="serve/inference/models.py",
        old="        if record is None:\n            raise unknown_model(model_id)",
        new="        if record is None:\n            return next(iter(self._bases.values()))",
        breaks="A request for an adapter that is not published is answered by the base, instead of a 404.",
        tests=("tests/serve/inference/test_routes.py::test_an_unknown_model_is_a_404_and_never_the_base",),
    ),
    # -- evaluation --------------------------------------------------------------------------------------------------
    Fault(
        name="answers-counted-unwritten",
        file="ft_service/evaluate/ask.py",
        old="await asyncio.to_thread(self._storage.write_bytes, name, content.encode())",
        new="await asyncio.to_thread(len, (name, content))",
        breaks="Answers count before they are on storage, so a killed evaluation has lost them.",
        tests=("tests/evaluate/test_ask.py::test_answers_count_once_they_are_on_storage",),
    ),
    Fault(
        name="other-weights-unnoticed",
        file="ft_service/evaluate/ask.py",
        old="if found != expected:",
        new="if found.base_fingerprint != expected.base_fingerprint:",
        breaks="An adapter that is replaced during its evaluation is judged by the answers of both.",
        tests=("tests/evaluate/test_ask.py::test_other_weights_under_the_same_name_stop_everything",),
    ),
    Fault(
        name="passages-count-as-many",
        file="ft_service/evaluate/comparison.py",
        old="[result.cluster for result in results],",
        new="[result.id for result in results],",
        breaks="Questions about one passage count as independent, and an adapter is called better on two passages.",
        tests=("tests/evaluate/test_comparison.py::test_items_of_one_passage_count_as_one_group",),
    ),
    Fault(
        name="skills-without-correction",
        file="ft_service/evaluate/comparison.py",
        old="or p_value <= 1 - LEVEL",
        new="or p_value <= 1",
        breaks="With eight skills, chance alone makes an adapter better at one of them in every third evaluation.",
        tests=("tests/evaluate/test_comparison.py::test_a_skill_among_many_needs_more_evidence",),
    ),
    Fault(
        name="judge-believed-once",
        file="ft_service/evaluate/judge.py",
        old="return Decision(named[0], False) if named[0] == named[1] else Decision(None, True)",
        new="return Decision(named[0], False)",
        breaks="A judge that prefers whatever it reads first decides comparisons.",
        tests=("tests/evaluate/test_run.py::test_a_judge_that_takes_the_first_answer_gives_only_ties",),
    ),
    Fault(
        name="promoted-unsettled",
        file="ft_service/evaluate/promotion.py",
        old='passed=forgetting.verdict == "within the limit"',
        new='passed=forgetting.verdict != "forgot"',
        breaks="An adapter is promoted although nobody knows whether it forgot.",
        tests=("tests/evaluate/test_promotion.py::test_what_is_not_settled_does_not_pass",),
    ),
)


# -- planting --------------------------------------------------------------------------------------------------------


def plant(fault: Fault, root: Path) -> None:
    """Break the tree at `root`. Raises `ValueError` unless the text to replace occurs exactly once in its file."""
    file = root / fault.file
    text = file.read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {count} times in {fault.file}, not once.")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def copy_tree(root: Path) -> None:
    """Copy the tracked files of this checkout to `root`, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


def outcomes(root: Path, tests: Sequence[str], seconds: float) -> dict[str, str]:
    """Run `tests` in the tree at `root`: node id -> passed, failed or skipped, for each test that ended in time."""
    file = root / "outcomes.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(root), _OUTCOMES: str(file)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __spec__.name, *tests]
    with (root / "pytest.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # its fixtures end what they started
            try:
                process.wait(TEAR_DOWN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if not file.exists():
        raise RuntimeError(f"no test ran:\n{log_of(root)}")
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        node, outcome = json.loads(line)
        # Set-up, call and tear-down each have an outcome: one that is not "passed" is the test's.
        if found.get(node, "passed") == "passed":
            found[node] = outcome
    return found


def log_of(root: Path) -> str:
    """The end of what pytest printed in the tree at `root`."""
    return (root / "pytest.log").read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]


def caught_by(planted: dict[str, str], unplanted: dict[str, str]) -> list[str]:
    """The tests that pass without the fault and fail with it."""
    return [node for node, outcome in planted.items() if outcome == "failed" and unplanted.get(node) == "passed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant (default: all)")
    parser.add_argument("--list", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    by_name = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in arguments.names if name not in by_name]:
        parser.error(f"no such fault: {', '.join(unknown)}. --list prints them.")
    faults = [by_name[name] for name in arguments.names] or list(FAULTS)
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:32} {fault.file}: {fault.breaks}")
        return 0

    with tempfile.TemporaryDirectory(prefix="unplanted-") as folder:
        copy_tree(Path(folder))
        tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
        unplanted = outcomes(Path(folder), tests, TEST_SECONDS * len(faults))
        if set(unplanted.values()) != {"passed"}:
            print(f"Without a fault:\n{log_of(Path(folder))}", file=sys.stderr, flush=True)
    print("fault | caught by | seconds", flush=True)
    missed = 0
    for fault in faults:
        # A copy of its own: Python would take a file of the same size and second for the one it has compiled.
        with tempfile.TemporaryDirectory(prefix="planted-") as folder:
            copy_tree(Path(folder))
            plant(fault, Path(folder))
            began = time.monotonic()
            planted = outcomes(Path(folder), fault.tests, TEST_SECONDS)
            seconds = time.monotonic() - began
        if catching := caught_by(planted, unplanted):
            answer = catching[0] + (f" and {len(catching) - 1} more" if len(catching) > 1 else "")
        else:
            missed += 1
            without = {node: unplanted.get(node, "not run") for node in planted}
            answer = f"NOT CAUGHT (with the fault: {planted}; without: {without})"
        print(f"{fault.name} | {answer} | {seconds:.0f}", flush=True)
    return 1 if missed else 0


# -- as a plugin of pytest -------------------------------------------------------------------------------------------


def pytest_sessionstart(session: Any) -> None:
    """The code under test is the copy's, not that of an installed or another checkout.

    So are the tests: their fork server and their Ray clusters put the folder above `tests` on the path of all workers.
    """
    for package in (*PRODUCT, "tests"):
        file = __import__(package).__file__
        assert file is not None and Path(file).resolve().is_relative_to(Path.cwd().resolve()), f"{package} is {file}"


def pytest_runtest_logreport(report: Any) -> None:
    with open(os.environ[_OUTCOMES], "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
