"""Our server in a Ray of its own, without Ray's dashboard: `python -m benchmarks.serving.host SETTINGS.json PORT`.

`ft serve` starts the dashboard as well, whose processes would take CPU beside the gateway that is measured.
"""

import logging
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    from serve.transport import prepare_ray

    prepare_ray()  # as `ft serve` does
    import ray
    from ray import serve

    from serve.app import build_app
    from serve.run import LOGGING, PROXY_LOGGING
    from serve.settings import ServeSettings

    settings = ServeSettings.model_validate_json(Path(sys.argv[1]).read_bytes())
    context = ray.init(
        address="local",
        num_cpus=len(settings.bases) * settings.bases[0].replicas,
        include_dashboard=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    http_options = {"host": "127.0.0.1", "port": int(sys.argv[2])}
    serve.start(proxy_location="HeadOnly", http_options=http_options, logging_config=PROXY_LOGGING)
    serve.run(build_app(settings), name="ft", logging_config=LOGGING)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())  # after ray.init, which installs its own
    session = context.address_info["session_dir"]  # type: ignore[attr-defined]  # its base class lacks it
    print(f"Serving, logs in {session}", flush=True)
    ended.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()
