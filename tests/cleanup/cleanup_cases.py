"""Storages with runs, datasets, adapters and models, made without training."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.folder import LeaseHolder, RunFolder, State
from ft_service.storage.storage import Storage
from tests.registry.test_registry import DRAFT


@contextmanager
def object_store() -> Iterator[str]:
    """A template for URIs of folders in a bucket, on an S3 server of this process."""
    import boto3
    from moto.server import ThreadedMotoServer

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, credentials):
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="ft-storage")
        yield f"s3://ft-storage/{{}}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        server.stop()


def write_dataset(storage: Storage, digest: str, complete: bool = True) -> None:
    folder = f"datasets/{digest}" if complete else f"datasets/{digest}.preparing"
    storage.write_bytes(f"{folder}/rows-00000/train.arrow", b"rows" * 100)
    if complete:
        storage.write_json(f"{folder}/manifest.json", {})


def write_run(
    storage: Storage,
    run_id: str,
    state: State,
    dataset: str | None = None,
    base: str = "meta-llama/Llama-3.1-8B",
    joined: bool = True,
    live: bool = False,
) -> RunFolder:
    run = RunFolder(storage, run_id)
    if joined:
        spec = json.dumps({"name": run_id, "model": {"base": base}})
        storage.write_bytes(f"{run.path}/spec.yaml", spec.encode())
    if dataset is not None:
        storage.write_json(f"{run.path}/dataset.json", {"facts": {"digest": dataset}})
        storage.write_bytes(f"{run.path}/checkpoints/step-1/part-0.bin", b"checkpoint" * 50)
        storage.write_json(f"{run.path}/checkpoints/index.json", {})
    if live:
        holder = LeaseHolder(token="t", host="elsewhere", machine="elsewhere", pid=1, time=datetime.now(UTC))
        storage.write_json(f"{run.path}/lease.json", holder.model_dump(mode="json"))
    run.set_state(state)
    return run


def publish(
    storage: Storage, run_id: str, dataset: str, kind: str = "adapter", base: str = "b", fingerprint: str = "f"
) -> AdapterRecord:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "weights")
        folder.mkdir()
        (folder / f"{kind}_model.safetensors").write_bytes(f"weights of {run_id}".encode())
        about = {"id": base, "revision": None, "short_name": "llama", "fingerprint": fingerprint}
        draft = DRAFT | {"kind": kind, "run_id": run_id, "run_name": run_id, "dataset_digest": dataset, "base": about}
        return Registry(storage).publish(folder, draft, "llama", "card {id}")


def write_everything(storage: Storage) -> dict[str, AdapterRecord]:
    """Runs in every state; what they share; what nothing needs."""
    for digest in ("shared", "of-record", "unused", "of-live"):
        write_dataset(storage, digest)
    write_dataset(storage, "interrupted", complete=False)
    model = publish(storage, "done-full", "shared", kind="model")
    adapter = publish(storage, "gone", "of-record", base=f"/another/mount/models/{model.id}")
    write_run(storage, "done-full", "succeeded", "shared")
    write_run(storage, "stopped", "stopped", "shared")
    write_run(storage, "live", "running", "of-live", live=True)
    write_run(storage, "never-joined", "failed", joined=False)
    write_run(storage, "half-deleted", "succeeded", "of-half-deleted", joined=False)
    write_dataset(storage, "of-half-deleted")
    # Interrupted between hiding and deleting, and right at the start of hiding.
    hidden = publish(storage, "old", "of-hidden")
    write_dataset(storage, "of-hidden")
    Registry(storage).hide(hidden)
    begun = publish(storage, "begun", "of-begun")
    write_dataset(storage, "of-begun")
    tombstone = Registry(storage).hide(begun)
    storage.write_bytes(f"adapters/{begun.id}/record.json", tombstone.record.model_dump_json().encode())
    return {"model": model, "adapter": adapter, "hidden": hidden, "begun": begun}
