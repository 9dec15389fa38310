"""Promoted adapters: an alias that answers with the adapter of a run that was judged best, until another takes over.

    <storage>/promotions/<base short name>-<run name>.json

The alias is `<base short name>-<run name>@promoted`. A promotion is one small object, so that the alias moves at once
and whole: a request gets the earlier adapter or the new one. The object keeps who was promoted before.
"""

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ft_service.errors import NotPublishedError, StorageError, UnreachableError, UsageError
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.formats import StoredFile

PROMOTIONS = "promotions"
SUFFIX = "@promoted"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PassedCheck(_Part):
    """A threshold of the suite, and what was measured."""

    name: str
    passed: bool
    detail: str
    waived: str | None = Field(default=None, description="Why the check does not count although it failed.")


class EarlierPromotion(_Part):
    """An adapter that held the alias before."""

    adapter_id: str
    digest: str
    promoted: datetime


class Promotion(StoredFile):
    """Who answers under an alias, and why."""

    alias: str
    adapter_id: str
    digest: str
    promoted: datetime
    evaluation: str | None = Field(default=None, description="Id of the evaluation that the checks read.")
    checks: list[PassedCheck] = Field(default_factory=list)
    earlier: list[EarlierPromotion] = Field(default_factory=list, description="Oldest first.")


def alias_of(record: AdapterRecord) -> str:
    """The alias of the adapters of a run: it stays the same when the run is repeated."""
    return record.id.removesuffix(f"-{record.digest[:8]}") + SUFFIX


class Promotions:
    """Which adapters are promoted on a storage root."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._storage = registry.storage

    def find(self, alias: str) -> Promotion | None:
        """The promotion of an alias, None if nothing has it: one read. Raises `StorageError` if it cannot be read."""
        name = alias.removesuffix(SUFFIX)
        if name == alias or "/" in name or name.startswith("."):
            return None
        file = f"{PROMOTIONS}/{name}.json"
        try:
            content = self._storage.read_bytes(file)
        except UnreachableError:
            raise
        except StorageError:
            if not self._storage.exists(file):
                return None
            content = self._storage.read_bytes(file)  # written in between
        return Promotion.parse(content, self._storage.uri(file))

    def holders(self, aliases: Collection[str] | None = None) -> dict[str, str | None]:
        """Alias -> id of the adapter that holds it, of all or of these; None where the promotion cannot be read."""
        if aliases is None:
            names = sorted(self._storage.files(PROMOTIONS))
            aliases = [name.removesuffix(".json") + SUFFIX for name in names if name.endswith(".json")]
        found: dict[str, str | None] = {}
        for alias in aliases:
            try:
                promotion = self.find(alias)
            except UnreachableError:
                raise
            except StorageError:
                found[alias] = None
            else:
                if promotion is not None:
                    found[alias] = promotion.adapter_id
        return found

    def of(self, record: AdapterRecord) -> Promotion | None:
        """The promotion of this adapter, None if it is not promoted."""
        promotion = self.find(alias_of(record))
        return promotion if promotion is not None and promotion.adapter_id == record.id else None

    def promote(
        self, record: AdapterRecord, evaluation: str | None = None, checks: list[PassedCheck] | None = None
    ) -> Promotion:
        """Move the alias of the adapter's run to `record`. Its checks are the caller's duty.

        Raises `UsageError` for the model of a `full` run, and `NotPublishedError` if the adapter is deleted meanwhile.
        """
        if record.kind != "adapter":
            raise UsageError(
                f"ID = {record.id!r}: is a model of its own, and only adapters have aliases. Serve it as a base."
            )
        alias = alias_of(record)
        before = self.find(alias)
        earlier = [*before.earlier] if before else []
        if before is not None and before.adapter_id != record.id:
            earlier.append(
                EarlierPromotion(adapter_id=before.adapter_id, digest=before.digest, promoted=before.promoted)
            )
        promotion = Promotion(
            alias=alias,
            adapter_id=record.id,
            digest=record.digest,
            promoted=datetime.now(UTC),
            evaluation=evaluation,
            checks=checks or [],
            earlier=earlier,
        )
        self._write(promotion)
        if self._registry.find(record.id) is None:  # deleted between the caller's look and now
            self._restore(alias, before)
            raise NotPublishedError(f"adapter = {record.id!r}: was deleted meanwhile, so it is not promoted.")
        return promotion

    def demote(self, alias: str) -> Promotion:
        """Take an alias away; from now on it answers nothing. Raises `NotPublishedError` if it does not exist."""
        promotion = self.find(alias)
        if promotion is None:
            known = ", ".join(self.holders()) or "none"
            raise NotPublishedError(
                f"ALIAS = {alias!r}: does not exist on {self._storage.root}. Aliases that do: {known}."
            )
        self._restore(alias, None)
        return promotion

    def _write(self, promotion: Promotion) -> None:
        content: dict[str, Any] = promotion.model_dump(mode="json")
        self._storage.write_json(f"{PROMOTIONS}/{promotion.alias.removesuffix(SUFFIX)}.json", content)

    def _restore(self, alias: str, before: Promotion | None) -> None:
        if before is not None:
            self._write(before)
        else:
            self._storage.delete(f"{PROMOTIONS}/{alias.removesuffix(SUFFIX)}.json")
