"""What the driver asks of a real Ray: work on data as tasks, in order and done again after a death; actors ended."""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from transformers import PreTrainedTokenizerFast

from ft_service.cluster.ray_cluster import kill_actors, map_on_cluster, remove_placement_groups
from ft_service.data import prepare
from ft_service.data.files.shard import ShardChanged
from ft_service.data.prepare import prepare_dataset
from ft_service.data.read import scan
from ft_service.errors import DataError
from ft_service.model.scratch import train_tokenizer
from tests.data.test_prepare import Case, alpaca_records, rows_of
from tests.hosts import Cluster
from tests.shared_cluster import joined

pytestmark = pytest.mark.cluster

SECONDS = 60


@pytest.fixture(scope="module", autouse=True)
def two_cpus(cluster: Cluster) -> Iterator[None]:
    with joined(cluster):
        yield


# -- actors ----------------------------------------------------------------------------------------------------------


class Controller:
    def run(self) -> None:
        threading.Event().wait()


class Other:
    def answer(self) -> str:
        return "here"


def test_killing_actors_wakes_waiters_and_spares_other_classes() -> None:
    make = ray.remote(num_cpus=0)
    controller = make(Controller).remote()
    other = make(Other).remote()
    assert ray.get(other.answer.remote()) == "here"
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            ray.get(controller.run.remote())
        except ray.exceptions.RayActorError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    kill_actors("Controller")
    waiting.join(SECONDS)
    assert not waiting.is_alive() and errors
    assert ray.get(other.answer.remote()) == "here"
    kill_actors("Controller")  # there is none any more


class Reserving:
    """An actor that reserves all CPUs, as Ray Train's controller may."""

    def reserve(self) -> bool:
        group = ray.util.placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
        return bool(group.wait(SECONDS))


def test_what_a_killed_actor_reserved_is_released_whichever_ray_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "another:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:8265")
    reserving = ray.remote(num_cpus=0)(Reserving).remote()
    assert ray.get(reserving.reserve.remote())
    kill_actors("Reserving")
    remove_placement_groups()
    again = ray.util.placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    assert again.wait(SECONDS)
    ray.util.remove_placement_group(again)


# -- tasks -----------------------------------------------------------------------------------------------------------

# The tasks are closures: Ray then sends their code, rather than the name of a module that its workers do not have.


def test_results_come_from_other_processes_in_order() -> None:
    found = list(map_on_cluster(lambda shared, item: (shared[item], os.getpid()), "abcdefghij", range(10)))
    assert "".join(letter for letter, _ in found) == "abcdefghij"
    assert os.getpid() not in {pid for _, pid in found}


def test_a_projects_error_keeps_its_type() -> None:
    def task(shared: None, item: int) -> int:
        if item == 1:
            raise DataError("a.jsonl:7: unreadable")
        return item

    with pytest.raises(DataError, match=r"^a\.jsonl:7: unreadable$"):
        list(map_on_cluster(task, None, range(3)))


def test_a_task_that_a_node_cannot_do_runs_here() -> None:
    driver = os.getpid()

    def task(shared: None, item: int) -> int:
        if item == 1 and os.getpid() != driver:
            raise ShardChanged("not on this machine")
        return os.getpid()

    first, second, third = map_on_cluster(task, None, range(3))
    assert second == driver and driver not in {first, third}


def test_a_task_whose_process_dies_runs_again(tmp_path: Path) -> None:
    died = tmp_path / "died"

    def task(shared: Path, item: int) -> int:
        if item == 1 and not shared.exists():
            shared.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert list(map_on_cluster(task, died, range(3))) == [0, 1, 2]
    assert died.exists()


def test_a_dataset_prepared_on_the_cluster_is_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["number words in answer one"] * 4, vocab_size=340)
    monkeypatch.setattr(prepare, "scan", partial(scan, shard_bytes=4000))
    monkeypatch.setattr(prepare, "_GROUP_TOKENS", 3000)
    case = Case(tmp_path)
    records = [*alpaca_records(100), {"instruction": "q", "output": 1}, *alpaca_records(3)]
    spec = case.spec(case.write("a.jsonl", records), max_seq_len=256, validation={"fraction": 0.2})
    here = prepare_dataset(spec, tokenizer, case.storage)
    spread_case = case.spec(str(tmp_path / "a.jsonl"), max_seq_len=256, validation={"fraction": 0.2})
    elsewhere = Case(tmp_path / "elsewhere").storage
    said: list[str] = []
    there = prepare_dataset(spread_case, tokenizer, elsewhere, said.append, map_on_cluster)
    assert sum("shard" in line and "records read" in line for line in said) > 2
    assert len(list((tmp_path / "elsewhere/storage/datasets").glob("*/rows-*"))) > 1
    assert there.facts == here.facts and there.judgement == here.judgement and there.judgement.left_out
    for mine, theirs in ((here.train, there.train), (here.validation, there.validation)):
        assert [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows_of(mine)] == [
            (row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows_of(theirs)
        ]
