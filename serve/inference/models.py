"""The models of a server: its bases, and every adapter published for exactly one of them."""

import logging
import math
import re
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Protocol

from ft_service.cleanup.removal import hide_adapter
from ft_service.errors import FtError, StorageError, UsageError
from ft_service.registry.promotions import SUFFIX, Promotions
from ft_service.registry.registry import AdapterRecord, Listing, Registry, UnreadableRecord
from serve.http.errors import ApiError
from serve.inference.bases import ServedBase
from serve.inference.wire import ModelEntry

DIGEST_HEADER = "x-adapter-digest"
BASE_HEADER = "x-base-fingerprint"
REMEMBERED_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 1.0
"""So long requests wait until a model that was found before is looked up again."""
_LOOKING_THREADS = 4
OWNERS_SECONDS = 30.0
"""So long the owners of an adapter may have been read before."""
_MOST_REMEMBERED = 10_000
_SHORT_DIGEST = 8
_REFRESH_SECONDS = 60.0
_REFRESH_WAIT_SECONDS = 0.3
"""So long a listing waits for the index to be corrected. With thousands of folders that takes seconds."""
logger = logging.getLogger(__name__)
_ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")
FINE_TUNED = "ft:"
"""The names of fine-tuned models begin with it, as OpenAI's do. No adapter id contains a colon."""


Owner = tuple[str, str | None]
"""Id of an API key, and its organisation."""


class ModelNames(Protocol):
    """Further names of adapters, and whose they are. A name stands for one adapter, always."""

    def adapter_of(self, alias: str) -> str | None:
        """The id of its adapter; None for an unknown name."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """All names, with their adapters."""
        ...

    def owners(self, adapter: str | None = None) -> Mapping[str, Sequence[Owner]]:
        """The adapters, or the one named, that belong to somebody. All others are everybody's."""
        ...


class AddedBases(Protocol):
    """Bases that fine-tuning jobs have made while the server runs."""

    def find(self, record: AdapterRecord) -> ServedBase | None:
        """A published model as a base; None for one that this server does not serve."""
        ...

    def all(self) -> Sequence[tuple[AdapterRecord, ServedBase]]:
        """All of them, with their records."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """A model by its HTTP name, with the fingerprints of its weights. `adapter` None is the base."""

    id: str
    created: datetime
    base: ServedBase
    adapter: AdapterRecord | None
    full: AdapterRecord | None = None
    """The record of a base that a fine-tuning job has made."""

    @property
    def published(self) -> AdapterRecord | None:
        """The record of what a run has published; None for a base of the server's settings."""
        return self.adapter or self.full

    @cached_property
    def entry_json(self) -> bytes:
        """`entry` as JSON. Made once: an adapter never changes, and there may be thousands."""
        return self.entry().model_dump_json().encode()

    @property
    def root(self) -> str:
        """What the name stands for: an alias for its adapter, any other model for its base."""
        if self.adapter is not None and self.id != self.adapter.id:
            return self.adapter.id
        return self.base.name

    @property
    def system_fingerprint(self) -> str:
        adapter = self.adapter.digest[:_SHORT_DIGEST] if self.adapter else "none"
        return f"base:{self.base.ref.fingerprint[:_SHORT_DIGEST]}-adapter:{adapter}"

    @property
    def headers(self) -> dict[str, str]:
        digest = self.adapter.digest if self.adapter else "none"
        return {DIGEST_HEADER: digest, BASE_HEADER: self.base.ref.fingerprint}

    @property
    def note(self) -> str | None:
        """What differs from how the adapter was trained: a QLoRA adapter on a base that is not stored in 4 bits."""
        if self.adapter is None:
            return None
        trained_on = "nf4" if self.adapter.method.get("type") == "qlora" else None
        served_on = self.base.precision
        if trained_on == "nf4" and served_on != "nf4":
            return f"trained on the base in nf4 (QLoRA), served on the base in {served_on}: answers differ slightly"
        if trained_on is None and served_on == "nf4":
            return "trained on the base in its own precision, served on the base in nf4: answers differ slightly"
        return None

    def entry(self) -> ModelEntry:
        return ModelEntry(
            id=self.id,
            created=int(self.created.timestamp()),
            root=self.root,
            parent=self.base.name if self.adapter else self.base.parent,
            base_fingerprint=self.base.ref.fingerprint,
            base_precision=self.base.precision,
            max_model_len=self.base.context_length,
            digest=self.published.digest if self.published else None,
            record=self.published.model_dump(mode="json") if self.published else None,
            note=self.note,
        )


class ServedModels:
    """Looks models up in the registry, so that every gateway serves a published adapter at once."""

    def __init__(self, registry: Registry, bases: Sequence[ServedBase]) -> None:
        self.registry = registry
        self.bases = tuple(bases)
        self._remembered_seconds = 0.0 if registry.storage.is_local else REMEMBERED_SECONDS
        self._found: dict[str, tuple[ServedModel | None, float]] = {}
        self._looking = ThreadPoolExecutor(_LOOKING_THREADS, thread_name_prefix="look-up")
        self._looked_up: dict[str, tuple[Future[ServedModel], float]] = {}
        self._is_away = False
        started = datetime.now(UTC)
        self._promotions = Promotions(registry)
        self._known_aliases: dict[str, str | None] = {}
        self._aliases_read = -math.inf
        self._bases = {base.name: ServedModel(base.name, started, base, adapter=None) for base in bases}
        self._adapters: Mapping[str, ServedModel] = {}
        self._refreshed = float("-inf")
        self._refreshing = threading.Lock()
        self._logged: frozenset[UnreadableRecord] = frozenset()
        self._names: ModelNames | None = None
        self._added: AddedBases | None = None
        self._named: dict[str, str] = {}
        self._owners: dict[str, tuple[Sequence[Owner], float]] = {}

    def add_names(self, names: ModelNames) -> None:
        """Serve adapters under these names too."""
        self._names = names

    def add_bases(self, added: AddedBases) -> None:
        """Serve these bases too, and the adapters that are published for them."""
        self._added = added

    def owners(self, model: ServedModel) -> Sequence[Owner]:
        """Whose model it is; empty: everybody's."""
        if model.published is None or self._names is None:
            return ()
        adapter = model.published.id
        now = time.monotonic()
        owners, found = self._owners.get(adapter, ((), -math.inf))
        is_a_jobs = model.id.startswith(FINE_TUNED)  # so it has an owner, perhaps since a moment ago
        if now - found > OWNERS_SECONDS or (is_a_jobs and not owners):
            owners = self._names.owners(adapter).get(adapter, ())
            if len(self._owners) >= _MOST_REMEMBERED:
                self._owners.clear()
            self._owners[adapter] = (owners, now)
        return owners

    def all_owners(self) -> Mapping[str, Sequence[Owner]]:
        """Of every adapter and full model that belongs to somebody."""
        return self._names.owners() if self._names else {}

    def all(self) -> list[ServedModel]:
        """The bases, then what jobs have made, oldest first, then the names of fine-tuned and promoted models."""
        added = self._added.all() if self._added else ()
        bases = [*self.bases, *(base for _, base in added)]
        served = {id(base) for base in bases}
        earlier = self._adapters
        adapters: dict[str, ServedModel] = {}
        for record in self._listing().records:
            model = earlier.get(record.id)
            if model is None or model.adapter is not record or id(model.base) not in served:
                base = _base_of(record, bases)
                model = ServedModel(record.id, record.created, base, record) if base else None
            if model is not None:
                adapters[record.id] = model
        self._adapters = adapters
        by_id = {**{record.id: _full_model(record, base) for record, base in added}, **adapters}
        names = {**(self._names.aliases() if self._names else {}), **self._aliases()}
        aliases = [replace(by_id[holder], id=alias) for alias, holder in names.items() if holder in by_id]
        return [*self._bases.values(), *by_id.values(), *aliases]

    def read_ahead(self) -> threading.Thread:
        """List everything once in the background, so that the first client of a large registry waits for nothing."""
        thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        thread.start()
        return thread

    def _read_ahead(self) -> None:
        try:
            for model in self.all():
                _ = model.entry_json
        except FtError as error:  # whoever lists then gets the error
            logger.warning("cannot list the models ahead of time: %s", error)

    def resolve(self, model_id: str) -> ServedModel:
        """The model of that name. Raises `ApiError` 404 for any other; never falls back to a base.

        On remote storage a deletion elsewhere is noticed after `REMEMBERED_SECONDS`, so that not every request waits
        for a read. While that storage does not answer, models that were found before stay as they were.
        """
        if model_id in self._bases:
            return self._bases[model_id]
        model, found = self._found.get(model_id, (None, -math.inf))
        if model is None:
            return self._look_up(model_id)
        if time.monotonic() - found <= self._remembered_seconds:
            return model
        return self._look_up(model_id) if self.registry.storage.is_local else self._look_again(model_id, model)

    def is_at_hand(self, model_id: str | None) -> bool:
        """Whether `resolve` and `owners` read nothing at this moment. None is the only base."""
        if model_id is None or model_id in self._bases:
            return True
        now = time.monotonic()
        model, found = self._found.get(model_id, (None, -math.inf))
        if model is None or now - found > self._remembered_seconds:
            return False
        if self._names is None or model.published is None:
            return True
        owners, read = self._owners.get(model.published.id, ((), -math.inf))
        has_an_owner_soon = model.id.startswith(FINE_TUNED) and not owners
        return now - read <= OWNERS_SECONDS and not has_an_owner_soon

    def _look_up(self, model_id: str) -> ServedModel:
        now = time.monotonic()
        try:
            model = self._resolve(model_id)
        except ApiError:
            self.forget(model_id)
            raise
        if len(self._found) >= _MOST_REMEMBERED:
            self._found.clear()
        self._found[model_id] = (model, now)
        return model

    def _look_again(self, model_id: str, model: ServedModel) -> ServedModel:
        """One look-up at a time for each model: storage that is away keeps each waiting for a minute or more.

        Only requests that come in its first `LOOK_AGAIN_SECONDS` wait for it, until they have passed.
        """
        looking, began = self._looked_up.get(model_id) or self._begin_to_look(model_id)
        try:
            found = looking.result(max(0.0, began + LOOK_AGAIN_SECONDS - time.monotonic()))
        except (StorageError, TimeoutError) as error:
            if not self._is_away:
                reason = str(error) or f"no answer within {LOOK_AGAIN_SECONDS:g} s."
                logger.warning("models that were found before are served without looking again: %s", reason)
            self._is_away = True
            return model
        self._is_away = False
        return found

    def _begin_to_look(self, model_id: str) -> "tuple[Future[ServedModel], float]":
        begun = self._looked_up[model_id] = (self._looking.submit(self._look_up, model_id), time.monotonic())
        begun[0].add_done_callback(lambda _: self._looked_up.pop(model_id, None))
        return begun

    def _aliases(self) -> dict[str, str | None]:
        now = time.monotonic()
        if now - self._aliases_read > self._remembered_seconds:
            self._known_aliases = self._promotions.holders()
            self._aliases_read = now
        return self._known_aliases

    def forget(self, model_id: str) -> None:
        self._found.pop(model_id, None)

    def _resolve(self, model_id: str) -> ServedModel:
        if model_id.startswith(FINE_TUNED):
            return replace(self._resolve(self._adapter_of(model_id)), id=model_id)
        if model_id.endswith(SUFFIX):
            promotion = self._promotions.find(model_id)
            if promotion is None:
                raise unknown_model(model_id)
            return self._resolve(promotion.adapter_id)
        if not _ADAPTER_ID.fullmatch(model_id):
            raise unknown_model(model_id)
        record = self.registry.find(model_id)
        if record is None:
            raise unknown_model(model_id)
        if record.kind == "model":
            added = self._added.find(record) if self._added else None
            if added is not None:
                return _full_model(record, added)
            uri = self.registry.storage.uri(f"models/{record.id}")
            raise _not_found(f"The model {model_id!r} is not an adapter. Start a server with FT_BASE={uri}.")
        base = self._base_of(record)
        if base is None:
            needed = record.base.fingerprint[:_SHORT_DIGEST]
            served = ", ".join(f"{base.name} ({base.ref.fingerprint[:_SHORT_DIGEST]})" for base in self.bases)
            raise _not_found(
                f"The adapter {model_id!r} needs the base {record.base.id} ({needed}), and this server runs {served}. "
                "Use a server of that base."
            )
        return ServedModel(record.id, record.created, base, record)

    def _adapter_of(self, name: str) -> str:
        """Remembered, since it never changes. Raises `ApiError` 404, or `DatabaseError`."""
        adapter = self._named.get(name)
        if adapter is None:
            is_text = "\0" not in name  # which no database would look up
            adapter = self._names.adapter_of(name) if self._names and is_text else None
            if adapter is None:
                raise unknown_model(name)
            if len(self._named) >= _MOST_REMEMBERED:
                self._named.clear()
            self._named[name] = adapter
        return adapter

    def _listing(self) -> Listing:
        """What is published. Corrects the registry's index now and then, and logs each record that cannot be read."""
        if time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            refresh = threading.Thread(target=self._refresh, name="refresh-index", daemon=True)
            refresh.start()
            refresh.join(_REFRESH_WAIT_SECONDS)
        listing = self.registry.listing()
        for unreadable in listing.unreadable:
            if unreadable not in self._logged:
                logger.warning("not served: %s", unreadable.problem)
        self._logged = frozenset(listing.unreadable)
        return listing

    def _refresh(self) -> None:
        if self._refreshing.acquire(blocking=False):
            try:
                self.registry.refresh()
                self._refreshed = time.monotonic()
            finally:
                self._refreshing.release()

    def _base_of(self, record: AdapterRecord) -> ServedBase | None:
        base = _base_of(record, self.bases)
        if base is None and self._added is not None:
            base = _base_of(record, [added for _, added in self._added.all()])
        return base


def _base_of(record: AdapterRecord, bases: Sequence[ServedBase]) -> ServedBase | None:
    """The base that the adapter was trained on, in the precision of its training if it is served in several."""
    # The same checkpoint may have another folder or name where it was trained, so compare its content.
    fitting = [base for base in bases if base.ref.fingerprint == record.base.fingerprint]
    wants_nf4 = record.method.get("type") == "qlora"
    return min(fitting, key=lambda base: (base.precision == "nf4") != wants_nf4, default=None)


def _full_model(record: AdapterRecord, base: ServedBase) -> ServedModel:
    return ServedModel(record.id, record.created, base, adapter=None, full=record)


def deletable(model: ServedModel, pinned: Collection[str]) -> AdapterRecord:
    """What a run has published as this model.

    Raises `ApiError` 400 for a base of the server's settings, and for an adapter that they pin.
    """
    if model.published is None:
        message = f"{model.id!r} is a base of this server. Take it out of the server's settings."
        raise ApiError(400, message, "not_deletable", "model")
    if model.published.id in pinned:
        message = f"{model.published.id!r} is pinned. Take it out of `pinned` in the server's settings."
        raise ApiError(400, message, "not_deletable", "model")
    return model.published


def delete_published(models: ServedModels, model: ServedModel) -> None:
    """Hide a `deletable` model from now on; its files go once no request can be answering with it (`Deletions`; those
    of a full model by `serve.fine_tuning.model_servers`).

    Raises `UsageError` if something needs it, `StorageError`; it may be hidden by then.
    """
    assert model.published is not None
    try:
        hide_adapter(models.registry.storage, model.published.id)
    finally:
        models.forget(model.published.id)
        models.forget(model.id)


def unknown_model(model_id: str) -> ApiError:
    """What a client gets for a model that does not exist, or that it may not see."""
    return _not_found(f"The model {model_id[:200]!r} does not exist. GET /v1/models lists the models.")


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, "model_not_found", "model")


def only_base(registry: Registry) -> tuple[str, str | None]:
    """Id and revision of the one base that all adapters share. Raises `UsageError` if there is no or more than one."""
    bases = {(record.base.id, record.base.revision) for record in registry.records()}
    if len(bases) != 1:
        found = f"adapters name {', '.join(sorted(base for base, _ in bases))}" if bases else "no adapter is published"
        raise UsageError(f"base = None: {found} on {registry.storage.root}. Choose one with --base or FT_BASE.")
    return bases.pop()
