"""Exports: copies that can be checked, GGUF of merged weights, and uploads to a hub that answers on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import ExportError, ModelError, UsageError
from ft_service.export.export import export_folder, export_gguf
from ft_service.export.hub import export_to_hub, naming_advice
from ft_service.model.weight_files import WeightFiles
from ft_service.registry.card import card_for_hub, model_card
from ft_service.registry.registry import AdapterRecord, Registry, sha256_of
from ft_service.storage.storage import Storage
from tests.model.test_merge import stock_merge, write_adapter
from tests.registry.test_registry import DRAFT
from tests.worlds import TINY, made_up_texts, write_base

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, AdapterRecord]:
    """An adapter of a small Llama with Llama 3's tokenizer, published with a card."""
    folder = tmp_path_factory.mktemp("export")
    base = folder / "base"
    write_base(base, made_up_texts(20), 400, TINY)
    write_adapter(LlamaForCausalLM.from_pretrained(base), folder / "adapter")
    about = {"id": str(base), "revision": None, "short_name": "base", "fingerprint": WeightFiles(base).fingerprint()}
    draft = DRAFT | {"base": about, "method": {"type": "lora"}}
    registry = Registry(Storage(str(folder / "storage")))
    (folder / "adapter/README.md").unlink(missing_ok=True)  # peft's
    return registry, registry.publish(folder / "adapter", draft, "base", model_card(draft, None))


def test_a_folder_has_the_published_files_and_their_record(published: Any, tmp_path: Path) -> None:
    registry, record = published
    export_folder(registry, record, tmp_path / "deep/out")
    assert {file.name: sha256_of(file) for file in (tmp_path / "deep/out").iterdir() if file.name != "record.json"} == (
        record.files
    )
    assert AdapterRecord.parse((tmp_path / "deep/out/record.json").read_bytes(), "") == record
    with pytest.raises(UsageError, match="exists already"):
        export_folder(registry, record, tmp_path / "deep/out")


def test_damaged_files_are_not_exported(published: Any, tmp_path: Path) -> None:
    registry, record = published
    damaged = record.model_copy(update={"files": {**record.files, "README.md": "0" * 64}})
    with pytest.raises(ModelError, match=r"damaged on storage \(README\.md\)"):
        export_folder(registry, damaged, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_gguf_has_the_merged_weights_and_the_card(published: Any, tmp_path: Path) -> None:
    registry, record = published
    file = export_gguf(registry, record, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", f"{record.id}.gguf"]
    assert "library_name" in (tmp_path / "out/README.md").read_text()
    merged = stock_merge(Path(record.base.id), registry.folder(record))
    found = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(file).tensors}
    for ours, stock in (("blk.0.ffn_down", "mlp.down_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        expected = merged[f"model.layers.0.{stock}.weight"].detach().float().numpy()
        assert np.array_equal(found[f"{ours}.weight"], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing else is left
    with pytest.raises(UsageError, match="exists already"):
        export_gguf(registry, record, tmp_path / "out")


# -- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """What the hub's client asks for in an upload, answered from memory."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.rejects = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers["Authorization"])
                status, answer = hub.answer(self.path, content)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, content: bytes) -> tuple[int, Any]:
        if self.rejects:
            return 403, {"error": f"Forbidden: the token {TOKEN} may only read"}
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in content.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.requests.append(("commit", lines[0]["value"]["summary"]))
            commit = {"commitUrl": f"{self.url}/me/bot/commit/1", "commitOid": "1" * 40, "success": True}
            return 200, commit | {"hookOutput": "", "pullRequestUrl": None}
        body = json.loads(content)
        if path.endswith("/repos/create"):
            self.requests.append(("create", body))
            return 200, {"url": f"{self.url}/me/bot", "name": "me/bot"}
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in body["files"]]
            return 200, {"files": files}
        if path.endswith("/validate-yaml"):
            self.requests.append(("validate", body["content"]))
            return 200, {"warnings": [], "errors": []}
        return 404, {"error": path}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub
    from huggingface_hub import HfApi, constants

    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: HfApi(endpoint=hub.url))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def test_a_hub_gets_the_published_files_in_one_commit(published: Any, hub: Hub, capfd: Any) -> None:
    registry, record = published
    url = export_to_hub(registry, record, "me/bot")
    assert url == f"{hub.url}/me/bot/commit/1"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    requests = dict(hub.requests)
    assert requests["create"]["visibility"] == "private"
    assert requests["commit"] == f"Export {record.id} ({record.digest[:8]})"
    assert set(hub.files) == {*record.files, "record.json"}
    same = {name for name in record.files if name != "README.md"}
    folder = registry.folder(record)
    assert all(hub.files[name] == (folder / name).read_bytes() for name in same)
    assert TOKEN not in "".join(capfd.readouterr())
    assert not any(TOKEN.encode() in content for content in hub.files.values())


def test_a_refused_upload_says_why_without_the_token(published: Any, hub: Hub, monkeypatch: Any) -> None:
    registry, record = published
    hub.rejects = True
    with pytest.raises(ExportError, match="cannot be uploaded to") as caught:
        export_to_hub(registry, record, "me/bot")
    assert TOKEN not in str(caught.value) and "HF_TOKEN" in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(UsageError, match="is not a repository"):
        export_to_hub(registry, record, "just-a-name")


def test_the_hub_accepts_the_card_of_a_base_in_a_folder() -> None:
    def metadata(base: str) -> dict[str, Any]:
        draft = DRAFT | {"base": {"id": base, "revision": None, "short_name": "b", "fingerprint": "f"}}
        card = model_card(draft, None)
        sent = card_for_hub(card)
        assert sent.split("---\n", 2)[2] == card.split("---\n", 2)[2]
        fields: dict[str, Any] = yaml.safe_load(sent.split("---\n", 2)[1])
        return fields

    assert metadata("meta-llama/Llama-3.1-8B")["base_model"] == "meta-llama/Llama-3.1-8B"
    for base in ("/data/my-llama", "s3://bucket/models/x", "./llama"):
        assert "base_model" not in metadata(base) and metadata(base)["library_name"] == "peft"


@pytest.mark.parametrize(("name", "advised"), [("me/Llama-3.1-bot", False), ("me/llama_bot", False), ("me/bot", True)])
def test_the_license_names_the_repository(published: Any, name: str, advised: bool) -> None:
    base = published[1].base.model_copy(update={"id": "meta-llama/Llama-3.1-8B"})
    assert bool(naming_advice(published[1].model_copy(update={"base": base}), name)) is advised
    assert naming_advice(published[1], name) == ""


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_exports_and_prints_json(published: Any, tmp_path: Path) -> None:
    registry, record = published
    arguments = ["adapters", "export", record.id, str(tmp_path / "out"), "--storage", registry.storage.root]
    done = CliRunner().invoke(app, [*arguments, "--to", "gguf", "--gguf-type", "q8_0", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["result"] == str(tmp_path / "out" / f"{record.id}.gguf") and Path(shown["result"]).is_file()
    assert (shown["id"], shown["digest"], shown["to"]) == (record.id, record.digest, "gguf")


@pytest.mark.parametrize("option", [["--public"], ["--gguf-type", "bf16"], ["--base", "elsewhere"]])
def test_an_option_of_another_destination_is_rejected(published: Any, tmp_path: Path, option: list[str]) -> None:
    registry, record = published
    arguments = ["adapters", "export", record.id, str(tmp_path / "out"), "--storage", registry.storage.root]
    with pytest.raises(UsageError, match="only applies to"):
        CliRunner().invoke(app, [*arguments, "--to", "folder", *option], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
