"""Adapters of the last epochs are published beside the best one, each with the figures of its own step."""

import pytest

from ft_service.errors import SpecError
from ft_service.publish import publish, publish_epochs
from ft_service.registry.registry import Registry
from ft_service.runs.metrics import read_metrics
from ft_service.spec.load import parse_run_spec
from ft_service.train.epochs import published_epoch_steps
from tests.worlds import prepared_run, work, write_world

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"train.max_steps": "null", "train.epochs": 3, "checkpoint.publish_epochs": 2}, "last two"),
        ({"train.max_steps": "null", "train.epochs": 3, "checkpoint.publish_epochs": 9}, "all three"),
        ({"train.max_steps": "null", "train.epochs": 3}, "none"),
        ({"train.max_steps": 1, "checkpoint.publish_epochs": 2}, "none"),
    ],
)
def test_the_last_epochs_end_at_whole_steps_of_the_plan(world, settings, steps):
    plan = prepared_run(world, f"plan-{abs(hash(str(settings)))}", 1, **settings).plan()
    per_epoch = plan.dataset.rows / plan.global_batch_size
    ends = [-(-plan.dataset.rows * epoch // plan.global_batch_size) for epoch in (1, 2, 3)]
    expected = {"last two": ends[1:], "all three": ends, "none": []}[steps]
    assert published_epoch_steps(plan) == set(expected) and per_epoch > 1


def test_a_full_run_has_no_adapters_of_epochs():
    with pytest.raises(SpecError, match=r"checkpoint\.publish_epochs"):
        parse_run_spec(
            "{name: x, model: {base: a/b}, method: {type: full}, storage: /s, checkpoint: {publish_epochs: 1}, "
            "data: {train: [{path: x.jsonl}]}}"
        )


def test_the_adapters_of_the_last_epochs_are_published(world):
    run = prepared_run(
        world, "epochs", 1, **{"train.max_steps": "null", "train.epochs": 3, "checkpoint.publish_epochs": 2}
    )
    work(run)
    best = publish(run)
    published = publish_epochs(run)
    registry = Registry(run.storage)
    metrics = {one.step: one for one in read_metrics(run.storage, run.run_id)}
    steps = sorted(published_epoch_steps(run.plan()))
    assert [one.step for one in published] == steps and len(steps) == 2
    for one in published:
        record = registry.resolve(one.adapter)
        assert (record.steps, record.final_loss) == (one.step, metrics[one.step].loss)
        assert not registry.damaged_files(record)
        assert (record.digest == best.digest) == (one.step == best.steps)
    assert len({one.adapter for one in published}) == 2
    assert publish_epochs(run) == published == run.epoch_adapters()  # again is harmless
    assert not run.storage.exists(f"{run.path}/epochs")
