"""The whole life of a fine-tuning job with OpenAI's Python client, unmodified: `python FILE URL KEY FOLDER MODEL`.

Works with every version from 1.x on. Prints what it saw as JSON; the test judges that.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import openai

ENDED = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 0.05


def main(url: str, key: str, folder: Path, model: str) -> dict[str, Any]:
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=2, timeout=60)
    seen: dict[str, Any] = {"version": openai.__version__}
    training, validation = use_files(client, folder, seen)
    use_uploads(client, folder, seen)
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=training,
        validation_file=validation,
        suffix="whole",
        seed=7,
        metadata={"team": "a", "client": openai.__version__},
        integrations=[
            {"type": "wandb", "wandb": {"project": "p", "name": "n", "entity": "e", "tags": ["t"]}},
        ],
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5},
            },
        },
    )
    older = client.fine_tuning.jobs.create(
        model=model,
        training_file=training,
        suffix="hold-older",
        metadata={"client": openai.__version__},
        hyperparameters={"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
    )
    seen["statuses"] = [job.status]
    job = until(client, job.id, ENDED, seen["statuses"])
    seen["job"] = job.to_dict(mode="json")
    use_results(client, job, seen)
    pause_and_resume(client, older.id, seen)
    cancel(client, model, training, seen)
    fail(client, model, training, seen)
    list_jobs(client, seen)
    seen["errors"] = list(errors(client, model, training))
    seen["deleted"] = [client.models.delete(job.fine_tuned_model).deleted, client.files.delete(training).deleted]
    return seen


def use_files(client: openai.OpenAI, folder: Path, seen: dict[str, Any]) -> tuple[str, str]:
    train = folder / "train.jsonl"
    with open(train, "rb") as stream:
        made = client.files.create(file=stream, purpose="fine-tune")
    done = client.files.wait_for_processing(made.id, poll_interval=POLL_SECONDS)
    seen["file"] = client.files.retrieve(made.id).to_dict(mode="json")
    seen["file_processed"] = done.status
    seen["content_is_equal"] = client.files.content(made.id).read() == train.read_bytes()
    valid = client.files.create(
        file=(folder / "valid.jsonl"),
        purpose="fine-tune",
        extra_body={"expires_after": {"anchor": "created_at", "seconds": 3600}},  # 1.x has no parameter of its own
    )
    seen["expires_in"] = (valid.expires_at or 0) - valid.created_at
    bad = client.files.create(file=("bad.jsonl", b'{"messages": []}\n{"messages": 1}\nno\n'), purpose="fine-tune")
    bad = client.files.wait_for_processing(bad.id, poll_interval=POLL_SECONDS)
    seen["bad_file"] = [bad.status, bad.status_details]
    newest = [file.id for file in client.files.list(purpose="fine-tune", limit=1, order="desc")]
    oldest = [file.id for file in client.files.list(purpose="fine-tune", limit=1, order="asc")]
    seen["paged_both_ways"] = newest == oldest[::-1] and {made.id, valid.id, bad.id} <= set(newest)
    for purpose in ("assistants", "batch", "vision", "user_data", "evals"):
        other = client.files.create(file=("notes.jsonl", b"{}\n"), purpose=purpose)
        kept = client.files.retrieve(other.id)
        seen.setdefault("purposes", []).append(kept.purpose)
        client.files.delete(other.id)
        upload = client.uploads.create(bytes=3, filename="notes.jsonl", mime_type="text/jsonl", purpose=purpose)
        part = client.uploads.parts.create(upload.id, data=b"{}\n")
        whole = client.uploads.complete(upload.id, part_ids=[part.id])
        assert whole.file is not None
        client.files.delete(whole.file.id)
    seen["bad_deleted"] = client.files.delete(bad.id).deleted
    return made.id, valid.id


def use_uploads(client: openai.OpenAI, folder: Path, seen: dict[str, Any]) -> None:
    content = (folder / "train.jsonl").read_bytes()
    half = len(content) // 2
    upload = client.uploads.create(
        bytes=len(content),
        filename="parts.jsonl",
        mime_type="text/jsonl",
        purpose="fine-tune",
        extra_body={"expires_after": {"anchor": "created_at", "seconds": 7200}},
    )
    parts = [client.uploads.parts.create(upload.id, data=piece).id for piece in (content[:half], content[half:])]
    done = client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(content).hexdigest())
    assert done.file is not None
    seen["upload"] = [upload.status, done.status, client.files.content(done.file.id).read() == content]
    bad = b'{"messages": 1}\n'
    upload = client.uploads.create(bytes=len(bad), filename="bad.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=bad)
    done = client.uploads.complete(upload.id, part_ids=[part.id])
    assert done.file is not None
    client.files.wait_for_processing(done.file.id, poll_interval=POLL_SECONDS)
    again = client.uploads.complete(upload.id, part_ids=[part.id])  # as a client does that got no answer
    assert again.file is not None
    seen["upload_repeated"] = [again.file.id == done.file.id, again.file.status, bool(again.file.status_details)]
    other = client.uploads.create(bytes=5, filename="x.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    seen["upload_cancelled"] = client.uploads.cancel(other.id).status
    chunked = client.uploads.upload_file_chunked(
        file=folder / "train.jsonl", mime_type="text/jsonl", purpose="fine-tune", part_size=half
    )
    seen["chunked"] = chunked.status


def use_results(client: openai.OpenAI, job: Any, seen: dict[str, Any]) -> None:
    model = job.fine_tuned_model
    seen["events"] = [
        [event.level, event.type, event.message] for event in client.fine_tuning.jobs.list_events(job.id, limit=2)
    ]
    seen["checkpoints"] = [
        checkpoint.to_dict(mode="json") for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)
    ]
    seen["result_purpose"] = client.files.retrieve(job.result_files[0]).purpose
    seen["result_file"] = client.files.content(job.result_files[0]).read().decode()
    seen["model"] = client.models.retrieve(model).to_dict(mode="json")
    seen["is_listed"] = model in [one.id for one in client.models.list()]
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])
    seen["answer"] = [answer.model, answer.choices[0].message.content]
    checkpoint = seen["checkpoints"][-1]["fine_tuned_model_checkpoint"]
    answer = client.chat.completions.create(model=checkpoint, messages=[{"role": "user", "content": "Hi"}])
    seen["checkpoint_answers"] = bool(answer.choices[0].message.content)


def pause_and_resume(client: openai.OpenAI, job_id: str, seen: dict[str, Any]) -> None:
    statuses: list[str] = []
    job = until(client, job_id, ("running",), statuses)
    while job.estimated_finish is None:  # from the second step on
        time.sleep(POLL_SECONDS)
        job = client.fine_tuning.jobs.retrieve(job_id)
    client.fine_tuning.jobs.pause(job_id)
    until(client, job_id, ("paused",), statuses)
    client.fine_tuning.jobs.resume(job_id)
    until(client, job_id, ENDED, statuses)
    seen["paused_and_resumed"] = statuses


def cancel(client: openai.OpenAI, model: str, training: str, seen: dict[str, Any]) -> None:
    job = client.fine_tuning.jobs.create(model=model, training_file=training, suffix="hold-cancelled")
    until(client, job.id, ("running",), [])
    client.fine_tuning.jobs.cancel(job.id)
    seen["cancelled"] = until(client, job.id, ENDED, []).status
    for act in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        try:
            act(job.id)
        except openai.BadRequestError as error:
            seen.setdefault("illegal", []).append(error.code)


def fail(client: openai.OpenAI, model: str, training: str, seen: dict[str, Any]) -> None:
    auto: Any = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=training,
        suffix="fails",
        method={"type": "supervised", "supervised": {"hyperparameters": auto}},
    )
    failed = until(client, job.id, ENDED, [])
    assert failed.error is not None
    levels = {event.level for event in client.fine_tuning.jobs.list_events(job.id)}
    leaky = client.fine_tuning.jobs.create(model=model, training_file=training, validation_file=training)
    refused = until(client, leaky.id, ENDED, [])
    assert refused.error is not None
    seen["refused"] = [refused.status, refused.error.code, refused.error.param]
    seen["failed"] = [failed.status, failed.error.code, failed.error.message, sorted(levels)]


def list_jobs(client: openai.OpenAI, seen: dict[str, Any]) -> None:
    whole = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    mine = client.fine_tuning.jobs.list(limit=1, extra_query={"metadata[client]": openai.__version__})
    seen["listed"] = [len(whole) == len(set(whole)), len(list(mine))]


def errors(client: openai.OpenAI, model: str, training: str) -> Any:
    """Class, status and code of what is refused."""
    create = client.fine_tuning.jobs.create
    refused: tuple[tuple[str, Any], ...] = (
        ("unknown model", lambda: create(model="no-such-model", training_file=training)),
        ("unknown file", lambda: create(model=model, training_file="file-none")),
        ("dpo", lambda: create(model=model, training_file=training, method={"type": "dpo"})),
        (
            "reinforcement",
            lambda: create(model=model, training_file=training, extra_body={"method": {"type": "reinforcement"}}),
        ),
        ("suffix", lambda: create(model=model, training_file=training, suffix="x" * 65)),
        ("unknown job", lambda: client.fine_tuning.jobs.retrieve("ftjob-none")),
        ("unknown file id", lambda: client.files.retrieve("file-none")),
        ("wrong key", lambda: client.with_options(api_key="wrong").fine_tuning.jobs.list()),
    )
    for name, call in refused:
        try:
            call()
            yield [name, "accepted"]
        except openai.APIStatusError as error:
            yield [name, type(error).__name__, bool(error.code), bool(error.message)]


def until(client: openai.OpenAI, job_id: str, wanted: tuple[str, ...], statuses: list[str]) -> Any:
    """Poll until a status is reached; note each one on the way. The test ends a script that waits for ever."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status not in statuses[-1:]:
            statuses.append(job.status)
        if job.status in wanted:
            return job
        if job.status in ENDED:
            raise SystemExit(f"{job_id} is {job.status}, not {wanted}: {job.error}")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])))
