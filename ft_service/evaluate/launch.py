"""From the arguments of `ft evaluate` or of a job to an evaluation: on a server that runs, or one started for it."""

from contextlib import ExitStack

from ft_service.errors import UsageError
from ft_service.evaluate.ask import Endpoint
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.run import Request, Show, evaluate
from ft_service.evaluate.server import started_server
from ft_service.evaluate.suite import load_suite
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage


def evaluate_on(request: Request, server: str | None, key: str | None, base: str | None, show: Show) -> Evaluation:
    """Evaluate on the server at an address, or on one that is started for it and stopped afterwards.

    `base` is where the base is now, if it has moved. Raises as `evaluate` does, and `UsageError`.
    """
    if server is not None:
        if base is not None:
            raise UsageError(f"--base = {base!r}: only applies without --server. Leave it out.")
        return evaluate(request, Endpoint(server, key), show)
    load_suite(request.suite)  # before a server is started
    record = Registry(Storage(request.storage)).resolve(request.adapter)
    if record.kind == "model":
        raise UsageError(
            f"ADAPTER = {record.id!r}: is a model and no adapter, so it is a server's base. Start one for each model "
            "with ft serve --base, and pass --server URL and --against NAME."
        )
    with ExitStack() as stack:
        url = stack.enter_context(started_server(request.storage, base or record.base.id))
        return evaluate(request, Endpoint(url, key), show)
