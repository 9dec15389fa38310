"""No vote is lost after its reply: the server is killed with SIGKILL, right after a reply and in the middle of many."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from serve.database.database import open_database, session
from serve.database.tables import VoteRow
from serve.voting.studies import open_study
from tests.serve.voting.voting_world import Rater, Voting, make_study

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "tests.serve.voting.vote_server", f"sqlite:///{folder}/service.db", f"{folder}/s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def votes(made: Voting) -> dict[str, str]:
    """As a new process reads them."""
    with session(open_database(str(made.engine.url))) as opened:
        return {row.assignment: row.outcome for row in opened.scalars(select(VoteRow))}


def rebuilt(made: Voting, folder: Path) -> dict[str, str]:
    engine = open_database(f"sqlite:///{folder}/rebuilt.db")
    open_study(engine, made.storage, made.study.name)
    with session(engine) as opened:
        return {row.assignment: row.outcome for row in opened.scalars(select(VoteRow))}


def test_a_server_that_is_killed_right_after_the_reply_has_kept_the_vote(tmp_path):
    made = make_study(open_database(f"sqlite:///{tmp_path}/service.db"), f"{tmp_path}/s")
    with server(tmp_path) as (process, url), httpx.Client(base_url=url, timeout=SECONDS) as client:
        rater = Rater(client, made.token("anna"))
        first = rater.state().json()["comparison"]
        assert rater.vote(first, "right").status_code == 200
        os.kill(process.pid, signal.SIGKILL)
    assert votes(made) == rebuilt(made, tmp_path) == {first["id"]: "right"}
    with server(tmp_path) as (_, url), httpx.Client(base_url=url, timeout=SECONDS) as client:
        assert Rater(client, made.token("anna")).state().json()["done"] == 1


def test_of_many_votes_at_once_none_that_was_answered_is_lost(tmp_path):
    names = [f"r{number}" for number in range(12)]
    made = make_study(
        open_database(f"sqlite:///{tmp_path}/service.db"),
        f"{tmp_path}/s",
        questions=20,
        raters=names,
        votes_per_item=12,
    )
    links = made.links()
    answered: dict[str, str] = {}
    enough = threading.Event()

    def vote(name: str, url: str) -> None:
        with httpx.Client(base_url=url, timeout=SECONDS) as client:
            rater = Rater(client, links[name].partition("#")[2])
            try:
                state = rater.state().json()
                while state["comparison"]:
                    comparison = state["comparison"]
                    response = rater.vote(comparison, "tie")
                    assert response.status_code == 200
                    answered[comparison["id"]] = "tie"
                    if len(answered) >= 60:
                        enough.set()
                    state = response.json()
            except httpx.TransportError:
                return  # killed

    with server(tmp_path) as (process, url), ThreadPoolExecutor(len(names)) as pool:
        done = [pool.submit(vote, name, url) for name in names]
        assert enough.wait(SECONDS)
        os.kill(process.pid, signal.SIGKILL)
        for one in done:
            one.result()
    kept = votes(made)
    assert 60 <= len(answered) < 240
    assert answered.items() <= kept.items()
    assert kept.items() <= rebuilt(made, tmp_path).items()
    with server(tmp_path) as (_, url), httpx.Client(base_url=url, timeout=SECONDS) as client:
        for name in names:
            Rater(client, links[name].partition("#")[2]).vote_all("tie")
    assert len(votes(made)) == 240 and votes(made) == rebuilt(made, tmp_path)
