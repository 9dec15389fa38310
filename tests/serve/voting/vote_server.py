"""A server of votes in a process of its own, to be killed.

python -m tests.serve.voting.vote_server DATABASE STORAGE
"""

import socket
import sys

import uvicorn

from tests.serve.voting.voting_world import voting_api


def main(database: str, storage: str) -> None:
    """Serve on a free port, and print it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(voting_api(database, storage), log_level="warning", lifespan="off"))
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
