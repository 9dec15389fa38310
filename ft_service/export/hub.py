"""Exports an adapter or model to a repository of the Hugging Face hub.

The token comes from the hub's client: HF_TOKEN, or what `hf auth login` has saved. It is not an option of a command, so
it is in no shell history, and it is masked wherever an error of the client is shown.
"""

import re
import tempfile
from pathlib import Path

from ft_service.catalog import models
from ft_service.errors import ExportError, UsageError
from ft_service.export.export import export_folder
from ft_service.registry.card import card_for_hub
from ft_service.registry.registry import CARD_FILE, AdapterRecord, Registry
from ft_service.text import error_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def export_to_hub(
    registry: Registry,
    record: AdapterRecord,
    repository: str,
    merged: bool = False,
    public: bool = False,
    base: str | None = None,
) -> str:
    """Upload to the repository ``user/name``, which is created, private unless `public`, if it does not exist.

    The visibility of an existing repository does not change. All files arrive in one commit. Returns its URL. Raises
    `UsageError` for an invalid name, `ExportError` if the hub does not accept the upload or does not respond, and what
    `export_folder` raises.
    """
    from huggingface_hub import HfApi

    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"DESTINATION = {repository!r}: is not a repository. Write it as USER/NAME.")
    with tempfile.TemporaryDirectory(prefix="ft-export-") as temporary:
        folder = Path(temporary, repository.rpartition("/")[2])
        export_folder(registry, record, folder, merged, base)
        card = folder / CARD_FILE
        card.write_text(card_for_hub(card.read_text(encoding="utf-8")), encoding="utf-8")
        try:
            api = HfApi()
            api.create_repo(repository, private=not public, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Export {record.id} ({record.digest[:8]})"
            )
        except Exception as error:  # errors of the hub's client, of its HTTP client, and OS errors
            raise ExportError(
                f"DESTINATION = {repository!r}: cannot be uploaded to ({_masked(error_line(error))}). Check the name, "
                "your network and HF_TOKEN, which needs write access."
            ) from None
    return str(commit.commit_url)


def naming_advice(record: AdapterRecord, repository: str) -> str:
    """What the base's license asks of a distributed model's name, if `repository` does not follow it; otherwise ''."""
    facts = models.find(record.base.id)
    name = repository.rpartition("/")[2]
    if facts is None or _plain(name).startswith(_plain(facts.license.naming_prefix)):
        return ""
    prefix = facts.license.naming_prefix
    return f"The {facts.license.name} asks that the name of a distributed model starts with {prefix!r}, not {name!r}."


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _masked(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text
