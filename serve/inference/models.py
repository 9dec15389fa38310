"""The models of a server: its base, and every adapter published for exactly that base."""

import re
from dataclasses import dataclass

from ft_service.errors import NotPublishedError, UsageError
from ft_service.registry.registry import AdapterRecord, BaseModelRef, Registry
from serve.http.errors import ApiError
from serve.inference.wire import ModelEntry

DIGEST_HEADER = "x-adapter-digest"
BASE_HEADER = "x-base-fingerprint"
_SHORT_DIGEST = 8
_ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


@dataclass(frozen=True)
class ServedModel:
    """A model by its HTTP name, with the fingerprints of its weights. `adapter` None is the base."""

    id: str
    created: int
    base: BaseModelRef
    adapter: AdapterRecord | None

    @property
    def system_fingerprint(self) -> str:
        adapter = self.adapter.digest[:_SHORT_DIGEST] if self.adapter else "none"
        return f"base:{self.base.fingerprint[:_SHORT_DIGEST]}-adapter:{adapter}"

    @property
    def headers(self) -> dict[str, str]:
        digest = self.adapter.digest if self.adapter else "none"
        return {DIGEST_HEADER: digest, BASE_HEADER: self.base.fingerprint}

    def entry(self) -> ModelEntry:
        return ModelEntry(
            id=self.id,
            created=self.created,
            root=self.base.short_name,
            parent=self.base.short_name if self.adapter else None,
            base_fingerprint=self.base.fingerprint,
            digest=self.adapter.digest if self.adapter else None,
            record=self.adapter.model_dump(mode="json") if self.adapter else None,
        )


class ServedModels:
    """Reads the registry at every call, so every replica serves a published adapter at once."""

    def __init__(self, registry: Registry, base: BaseModelRef, created: int) -> None:
        self.registry = registry
        self._base = ServedModel(base.short_name, created, base, adapter=None)

    @property
    def base(self) -> ServedModel:
        return self._base

    def all(self) -> list[ServedModel]:
        """The base, then its adapters, oldest first."""
        return [self._base, *(self._served(record) for record in self.registry.records() if self._fits(record))]

    def resolve(self, model_id: str) -> ServedModel:
        """The model of that name. Raises `ApiError` 404 for any other; never falls back to the base."""
        if model_id == self._base.id:
            return self._base
        if not _ADAPTER_ID.fullmatch(model_id):
            raise _unknown_model(model_id)
        try:
            record = self.registry.resolve(model_id)
        except NotPublishedError:
            raise _unknown_model(model_id) from None
        if record.kind == "model":
            uri = self.registry.storage.uri(f"models/{record.id}")
            raise _not_found(f"The model {model_id!r} is not an adapter. Start a server with FT_BASE={uri}.")
        if not self._fits(record):
            needed = record.base.fingerprint[:_SHORT_DIGEST]
            served = self._base.base.fingerprint[:_SHORT_DIGEST]
            raise _not_found(
                f"The adapter {model_id!r} needs the base {record.base.id} ({needed}), and this server runs "
                f"{self._base.id} ({served}). Use a server of that base."
            )
        return self._served(record)

    def _fits(self, record: AdapterRecord) -> bool:
        # The same checkpoint may have another folder or name here, so compare its content.
        return record.base.fingerprint == self._base.base.fingerprint

    def _served(self, record: AdapterRecord) -> ServedModel:
        return ServedModel(record.id, int(record.created.timestamp()), self._base.base, record)


def _unknown_model(model_id: str) -> ApiError:
    return _not_found(f"The model {model_id!r} does not exist. GET /v1/models lists the models.")


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, "model_not_found", "model")


def only_base(registry: Registry) -> tuple[str, str | None]:
    """Id and revision of the one base that all adapters share. Raises `UsageError` if there is no or more than one."""
    bases = {(record.base.id, record.base.revision) for record in registry.records()}
    if len(bases) != 1:
        found = f"adapters name {', '.join(sorted(base for base, _ in bases))}" if bases else "no adapter is published"
        raise UsageError(f"base = None: {found} on {registry.storage.root}. Choose one with --base or FT_BASE.")
    return bases.pop()
