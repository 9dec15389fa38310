"""What this service refuses on purpose, or does not have, of the client's types. Not counted in the conformance figure.

Each entry is the beginning of facts, and the reason. An entry that the run saw on the wire after all fails the test.
"""

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "JobCreateParams.method.dpo": "preference training is not there yet; the request is refused with its own message",
    "JobCreateParams.method.type='dpo'": "the same",
    "JobCreateParams.method.reinforcement": "reinforcement fine-tuning needs graders, which this service does not have",
    "JobCreateParams.method.type='reinforcement'": "the same",
    "FineTuningJob.method.dpo": "no job of this service has this method yet",
    "FineTuningJob.method.type='dpo'": "the same",
    "FineTuningJob.method.reinforcement": "no job of this service has this method",
    "FineTuningJob.method.type='reinforcement'": "the same",
    "JobCreateParams.model='": "names of OpenAI's models; here, a model is one that the server serves",
    "Model.shutdown_date": "no model of this service has a date of shutdown",
    **{
        f"{kind}='{purpose}'": "the file's use is another API of OpenAI"
        for kind in (
            "FileObject.purpose",
            "Upload.file.purpose",
            "FileCreateParams.purpose",
            "UploadCreateParams.purpose",
        )
        for purpose in ("assistants", "assistants_output", "batch", "batch_output", "vision", "user_data", "evals")
    },
    "Upload.file.purpose='fine-tune-results'": "an upload has the purposes of a request, and this one is of replies",
    "Upload.file.status='error'": "a file is refused before its upload completes, or after; never at that moment",
}


def is_refused(fact: str) -> bool:
    return any(
        fact == entry or fact.startswith((f"{entry}.", f"{entry}=", entry)) for entry in REFUSED if _covers(entry, fact)
    )


def _covers(entry: str, fact: str) -> bool:
    """An entry that ends within a literal covers every value that begins so."""
    return (
        fact == entry
        or fact.startswith((f"{entry}.", f"{entry}="))
        or (entry.endswith("='") and fact.startswith(entry))
    )
