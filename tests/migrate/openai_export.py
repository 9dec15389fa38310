"""A fine-tuning job as OpenAI's API returns it."""

from typing import Any

GPT = "gpt-4o-mini-2024-07-18"


def exported(**changes: Any) -> dict[str, Any]:
    """A job that has succeeded, with other values for some fields."""
    return {
        "id": "ftjob-old1",
        "object": "fine_tuning.job",
        "created_at": 1719000000,
        "error": None,
        "fine_tuned_model": f"ft:{GPT}:my-org:desk:9abCDefg",
        "finished_at": 1719003600,
        "hyperparameters": {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8},
        "model": GPT,
        "organization_id": "org-123",
        "result_files": ["file-results"],
        "seed": 42,
        "status": "succeeded",
        "trained_tokens": 5768,
        "training_file": "file-train",
        "validation_file": None,
        "estimated_finish": None,
        "integrations": [],
        "metadata": {"team": "desk"},
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}},
        },
        "user_provided_suffix": None,
        **changes,
    }
