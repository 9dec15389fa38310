"""The alias of the best adapter of a run: moved whole, kept with its history, and nothing under it can be deleted."""

from pathlib import Path

import pytest

from ft_service.cleanup.inventory import read_usage
from ft_service.cleanup.removal import delete_adapter
from ft_service.errors import NotPublishedError, UsageError
from ft_service.registry.promotions import Promotions, alias_of
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from tests.registry.test_registry import DRAFT


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "storage")))


def publish(registry: Registry, work: Path, content: str, run_name: str = "bot") -> AdapterRecord:
    folder = work / content
    folder.mkdir()
    (folder / "adapter_config.json").write_text(f'{{"r": 4, "name": "{content}"}}')
    return registry.publish(folder, {**DRAFT, "run_name": run_name}, "tiny", "# {id}\n")


def test_the_alias_moves_and_remembers_who_held_it(registry: Registry, tmp_path: Path) -> None:
    first = publish(registry, tmp_path, "first")
    second = publish(registry, tmp_path, "second")
    promotions = Promotions(registry)
    alias = alias_of(first)
    assert alias == "tiny-bot@promoted" == alias_of(second)
    assert promotions.find(alias) is None
    promotions.promote(first)
    assert promotions.find(alias).adapter_id == first.id
    promotions.promote(second)
    moved = promotions.find(alias)
    assert (moved.adapter_id, moved.digest) == (second.id, second.digest)
    assert [each.adapter_id for each in moved.earlier] == [first.id]
    assert promotions.of(first) is None and promotions.of(second) == moved
    promotions.promote(second)  # again: nothing new to remember
    assert [each.adapter_id for each in promotions.find(alias).earlier] == [first.id]


def test_a_promoted_adapter_cannot_be_deleted_until_the_alias_is_gone(registry: Registry, tmp_path: Path) -> None:
    first = publish(registry, tmp_path, "first")
    second = publish(registry, tmp_path, "second")
    promotions = Promotions(registry)
    promotions.promote(first)
    with pytest.raises(UsageError, match=r"promoted as tiny-bot@promoted.*ft adapters demote tiny-bot@promoted"):
        delete_adapter(registry.storage, first.id)
    assert registry.find(first.id) is not None
    delete_adapter(registry.storage, second.id)  # another one of the same run
    promotions.demote(alias_of(first))
    delete_adapter(registry.storage, first.id)
    assert registry.find(first.id) is None


def test_an_unreadable_promotion_protects_every_adapter_of_its_run(registry: Registry, tmp_path: Path) -> None:
    adapter = publish(registry, tmp_path, "first")
    other = publish(registry, tmp_path, "other", run_name="another")
    registry.storage.write_bytes("promotions/tiny-bot.json", b"{")
    aliases = {each.id: each.alias for each in read_usage(registry.storage).inventory.published}
    assert aliases == {adapter.id: "tiny-bot@promoted", other.id: ""}


def test_what_is_no_adapter_or_gone_is_not_promoted(registry: Registry, tmp_path: Path) -> None:
    adapter = publish(registry, tmp_path, "first")
    second = publish(registry, tmp_path, "second")
    promotions = Promotions(registry)
    promotions.promote(second)
    registry.hide(adapter)
    with pytest.raises(NotPublishedError, match="deleted meanwhile"):
        promotions.promote(adapter)
    assert promotions.find(alias_of(second)).adapter_id == second.id
    with pytest.raises(UsageError, match="only adapters have aliases"):
        promotions.promote(second.model_copy(update={"kind": "model"}))


@pytest.mark.parametrize("alias", ["tiny-bot", "../x@promoted", "a/b@promoted", ".hidden@promoted", "none@promoted"])
def test_other_names_are_no_aliases(registry: Registry, alias: str) -> None:
    assert Promotions(registry).find(alias) is None
    with pytest.raises(NotPublishedError, match="Aliases that do: none"):
        Promotions(registry).demote(alias)
