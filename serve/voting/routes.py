"""The vote page and what it asks. Raters have no API key: the token of their link opens one study, and nothing else."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from sqlalchemy import Engine

from ft_service.errors import DatabaseError, StorageError
from ft_service.storage.storage import Storage
from serve.http.body import read_json
from serve.http.errors import ApiError
from serve.http.openapi import reads
from serve.http.pages import page_response
from serve.voting.ballots import Ballot, Ballots, OfAssignment, Revealed, State
from serve.voting.links import VOTE_PATH, Rater, TokenCheck

PAGE = Path(__file__).with_name("page.html")
BODIES: list[type[BaseModel]] = [Ballot, OfAssignment]
_MOST_MIB = 0.0625
_RETRY_SECONDS = 5

T = TypeVar("T")


def voting_routes(engine: Engine, storage: Storage) -> APIRouter:
    """GET and HEAD /vote, the page; below it, what the page asks."""
    api = APIRouter()
    ballots = Ballots(engine, storage)
    tokens = TokenCheck(engine)

    async def for_rater(request: Request, act: Callable[[Rater], T]) -> T:
        """Check the token, then act, in a thread: both wait for the database."""

        def checked() -> T:
            return act(tokens.rater(_token(request)))

        try:
            return await asyncio.to_thread(checked)
        except (DatabaseError, StorageError) as error:
            request.scope["state"]["log"]["problem"] = str(error)  # which is none of a rater's business
            message = "Votes cannot be kept at this moment, so none was taken. Try again in a moment."
            raise ApiError(503, message, "votes_unavailable", retry_after=_RETRY_SECONDS) from None

    @api.get(VOTE_PATH, include_in_schema=False)
    @api.head(VOTE_PATH, include_in_schema=False)
    def page() -> HTMLResponse:
        return page_response(PAGE)

    @api.get(f"{VOTE_PATH}/state")
    async def state(request: Request) -> State:
        """What the rater is to judge now, and how far they are."""
        return await for_rater(request, ballots.state)

    @api.post(f"{VOTE_PATH}/votes", openapi_extra=reads(Ballot))
    async def vote(request: Request) -> State:
        """Vote; the reply has the next comparison. The same vote again counts once."""
        ballot = await read_json(request, Ballot, _MOST_MIB)
        return await for_rater(request, lambda rater: ballots.vote(rater, ballot))

    @api.post(f"{VOTE_PATH}/withdrawals", openapi_extra=reads(OfAssignment))
    async def withdraw(request: Request) -> State:
        """Withdraw the last vote."""
        body = await read_json(request, OfAssignment, _MOST_MIB)
        return await for_rater(request, lambda rater: ballots.withdraw_last(rater, body.assignment))

    @api.post(f"{VOTE_PATH}/reveals", openapi_extra=reads(OfAssignment))
    async def reveal(request: Request) -> Revealed:
        """Which models these were. Before a vote, this makes the comparison void."""
        body = await read_json(request, OfAssignment, _MOST_MIB)
        return await for_rater(request, lambda rater: ballots.reveal(rater, body.assignment))

    return api


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
