"""A pytest plugin: the one Ray cluster of all tests that leave a cluster as they find it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest

from tests.hosts import QUICK_HEALTH_CHECKS, ROOT, START_SECONDS, Cluster, Host, wait_for

HEAD = Host("head", "127.0.0.1", 1)
OTHER = Host("other", "127.0.0.1", 1)
# Ray Train looks at its workers every 2 s otherwise, and at each end of an attempt somebody waits for that.
OFTEN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and another node, with room for one worker each; token authentication is on."""
    with Cluster(tmp_path_factory.mktemp("cluster"), HEAD, {**QUICK_HEALTH_CHECKS, **OFTEN}) as found:
        found.start(HEAD, OTHER)
        wait_for(lambda: answers(found), START_SECONDS)
        yield found


@contextmanager
def joined(cluster: Cluster, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Meanwhile this process is a driver of the cluster; the code of tests can be imported by its workers.

    `environment` is for these workers, too.
    """
    import ray
    from ray._private.authentication_test_utils import reset_auth_token_state

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, cluster.environment[name])
        reset_auth_token_state()  # Ray reads both once in a process
        python_path = os.pathsep.join(filter(None, [str(ROOT), cluster.environment.get("PYTHONPATH")]))
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": python_path, **(environment or {})}})
        try:
            yield
        finally:
            ray.shutdown()
    reset_auth_token_state()


def answers(cluster: Cluster) -> bool:
    """Whether its dashboard does."""
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    try:
        return httpx.get(f"{cluster.dashboard}/api/version", headers=headers, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False
