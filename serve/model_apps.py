"""The applications of full models on Ray Serve, named after the server's own application and the model.

They belong to no route: the gateways reach them through handles. Serve keeps them when the server's application is
deployed again, and forgets them with the cluster; then the controller deploys them again.
"""

import hashlib
from collections.abc import Collection, Mapping

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from ft_service.errors import ServingError
from ft_service.text import last_line
from serve.base_app import base_app
from serve.fine_tuning.model_servers import AppStatus
from serve.replica import MakeEngine
from serve.settings import BaseSettings, ServeSettings

_LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)
_GIVEN_UP = "DEPLOY_FAILED"
"""Serve starts no more replicas, whoever asks."""
_FAILED = (_GIVEN_UP, "UNHEALTHY")
_UNPLACED = "to be scheduled"
"""In Serve's message about replicas that no node has had room for, for half a minute."""
_SEPARATOR = "."


def application_of(server: str, model_id: str) -> str:
    """The application of a model, of the server whose application is `server`."""
    return f"{server}{_SEPARATOR}{model_id}"


def applications_of(server: str, applications: Collection[str]) -> dict[str, str]:
    """Those of `applications` that are models of a server, by the model's id."""
    prefix = f"{server}{_SEPARATOR}"
    return {name.removeprefix(prefix): name for name in applications if name.startswith(prefix)}


class ServeApps:
    """See `serve.fine_tuning.model_servers.Apps`. Blocking: use it from a thread."""

    def __init__(self, server: str, settings: ServeSettings, make_engine: MakeEngine) -> None:
        self._server = server
        self._settings = settings
        self._make_engine = make_engine

    def deployed(self) -> Mapping[str, AppStatus]:
        try:
            applications = serve.status().applications
        except (RayError, RayServeException) as error:
            raise ServingError(f"Ray Serve's controller does not answer ({type(error).__name__}).") from None
        names = applications_of(self._server, applications)
        return {
            model_id: _status(applications[name])
            for model_id, name in names.items()
            if applications[name].status != "DELETING"
        }

    def deploy(self, model_id: str, base: BaseSettings) -> None:
        version = hashlib.sha256(base.model_dump_json().encode()).hexdigest()[:16]
        app = base_app(self._settings, base, self._make_engine, version)
        name = application_of(self._server, model_id)
        try:
            serve._run(app, _blocking=False, name=name, route_prefix=None, logging_config=_LOGGING)
        except (RayError, RayServeException, RuntimeError, ValueError) as error:
            raise ServingError(f"{name}: cannot be deployed ({last_line(str(error))}).") from None

    def delete(self, model_id: str) -> None:
        try:
            serve.delete(application_of(self._server, model_id), _blocking=False)
        except (RayError, RayServeException) as error:
            raise ServingError(f"Ray Serve's controller does not answer ({type(error).__name__}).") from None


def _status(application: ApplicationStatusOverview) -> AppStatus:
    deployments = application.deployments.values()
    failed = [one for one in deployments if one.status in _FAILED and one.message]
    return AppStatus(
        problem=last_line(failed[0].message) if failed else "",
        has_given_up=any(one.status == _GIVEN_UP for one in deployments),
        is_unplaced=not failed and any(_UNPLACED in one.message for one in deployments),
    )
