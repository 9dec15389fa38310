"""Whatever a client sends, the answer is a status below 500, soon, and the server is well afterwards.

Requests are made from our own OpenAPI page by schemathesis. By hand for longer: FT_FUZZ_EXAMPLES=2000 pytest FILE.
"""

import os
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.serve.local_server import local_server
from tests.serve.serving_world import make_world

pytestmark = pytest.mark.multiprocess

EXAMPLES = int(os.environ.get("FT_FUZZ_EXAMPLES", "40"))
SECONDS = 30
KEY = "a-key-of-this-test"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
    ("GET", "/v1/models/{model_id}"),
    ("DELETE", "/v1/models/{model_id}"),
    ("GET", "/v1/tokenizer_info"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs/estimate"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
    ("GET", "/v1/fine_tuning/keys"),
    ("GET", "/v1/fine_tuning/bases"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("GET", "/v1/files/{file_id}/errors"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/uploads"),
    ("GET", "/v1/uploads/{upload_id}"),
    ("GET", "/v1/uploads/{upload_id}/parts"),
    ("POST", "/v1/uploads/{upload_id}/parts"),
    ("POST", "/v1/uploads/{upload_id}/complete"),
    ("POST", "/v1/uploads/{upload_id}/cancel"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("world")
    settings = {
        "limits": {"max_choices": 4, "max_body_mib": 1},
        "database": f"sqlite:///{folder}/service.db",
        "api_key": KEY,
        "fine_tuning": {"templates": {"tiny-llama": {"model": {"base": "org/tiny"}}}},
        "bases": [{"base": "org/Tiny-Llama"}],
    }
    with local_server(make_world(folder), max_context=64, **settings) as address:
        yield address.removesuffix("/v1")


def test_every_route_of_files_and_jobs_is_among_them(url):
    paths = httpx.get(f"{url}/openapi.json", headers=AUTHORIZED, timeout=SECONDS).json()["paths"]
    prefixes = ("/v1/files", "/v1/uploads", "/v1/fine_tuning")
    known = {(method.upper(), path) for path, item in paths.items() if path.startswith(prefixes) for method in item}
    assert known - set(ROUTES) == set()


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[path for _, path in ROUTES])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_answered_by_a_5xx_or_not_at_all(url, method, path, mode):
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=AUTHORIZED)[path][method]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="FT_FUZZ_EXAMPLES" not in os.environ,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if isinstance(case.body, dict) and data.draw(st.booleans()):
            case.body["model"] = "tiny-llama"
        response = case.call(timeout=SECONDS, headers=AUTHORIZED)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert len(response.content) < 4096

    fuzz()
    assert httpx.get(f"{url}/v1/health", timeout=SECONDS).is_success
