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
    **{
        f"{kind}.purpose='{purpose}'": "files that OpenAI's Assistants and Batch APIs write; this service has neither"
        for kind in ("FileObject", "Upload.file")
        for purpose in ("assistants_output", "batch_output")
    },
    "Upload.file.purpose='fine-tune-results'": "only the service writes result files, and never by an upload",
    "Upload.status='expired'": "no call of the client returns an expired upload: it is refused by complete and cancel",
    "Model.shutdown_date": "no model of this service has a date of shutdown",
}

MISSING: Mapping[str, str] = {}
"""What is not there yet. It counts against the figure; whoever adds it removes it here."""


def is_refused(fact: str) -> bool:
    return fact.startswith(tuple(REFUSED))
