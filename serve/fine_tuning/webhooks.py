"""Webhooks: a signed call for each job that ends, as `client.webhooks.unwrap` of OpenAI's clients verifies it.

Signed by the rules of standard-webhooks: HMAC-SHA-256 over `<id>.<timestamp>.<body>`. A receiver may get a call more
than once, with the same `webhook-id`. A call goes to an address that was looked up and judged just before, so that a
name cannot point to a private address a moment later; redirects are not followed, and answers are not read.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from urllib.parse import urlsplit

import httpx

from ft_service.text import first_line
from serve.database.tables import WebhookRow
from serve.fine_tuning.job_records import Job, JobRecords, NewWebhook
from serve.fine_tuning.job_states import State
from serve.settings import FineTuningSettings

BACKOFF_SECONDS = (5, 30, 120, 600, 3600, 21_600)
"""After each failed attempt but the last; then a webhook is given up, after about 7 hours."""
CALL_SECONDS = 10.0
"""So long one call may take in all, whatever the receiver does."""
AT_ONCE = 20
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_LOOKUPS = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhook-lookup")
"""Not the event loop's threads, whose end `asyncio.run` awaits: a name server that does not answer takes minutes."""

Resolve = Callable[[str, int], Sequence[str]]


class ForbiddenAddressError(Exception):
    """The address is none that a webhook may go to."""


def webhooks_of(settings: FineTuningSettings, job: Job, state: State, now: datetime) -> list[NewWebhook]:
    """The calls that report the end of a job."""
    return [
        NewWebhook(
            webhook.url,
            {
                "id": f"evt_{secrets.token_hex(12)}",
                "object": "event",
                "created_at": int(now.timestamp()),
                "type": f"fine_tuning.job.{state}",
                "data": {"id": job.id},
            },
        )
        for webhook in settings.webhooks
        if state in webhook.events
    ]


def signature(secret: str, webhook_id: str, timestamp: int, body: str) -> str:
    """The header `webhook-signature`. A secret that begins with whsec_ is base64."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    digest = hmac.new(key, f"{webhook_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises `OSError`."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def allowed_address(url: str, allow_private: bool, lookup: Resolve = resolve) -> str:
    """The address that a call goes to. Raises `ForbiddenAddressError` if one of the host's is private, or `OSError`."""
    parts = urlsplit(url)
    addresses = lookup(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    for address in addresses:
        found = ipaddress.ip_address(address.partition("%")[0])
        if not allow_private and any(not one.is_global or one.is_multicast for one in _reached(found)):
            raise ForbiddenAddressError(
                f"{parts.hostname} has the private address {address}. To allow that, set fine_tuning.private_webhooks"
            )
    if not addresses:
        raise OSError(f"{parts.hostname} has no address")
    return addresses[0]


def _reached(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """What a call to an address may reach: of an IPv6 address that contains one of IPv4, that one.

    Mapped and compatible addresses, NAT64, 6to4 and Teredo. Python counts most of them as global.
    """
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and (address in _NAT64 or address in _IPV4_COMPATIBLE):
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if embedded is not None:
        yield embedded
    if address.ipv4_mapped is None:
        yield address
    yield from address.teredo or ()


@dataclass(frozen=True)
class Deliveries:
    """Delivers the webhooks that are due."""

    records: JobRecords
    settings: FineTuningSettings
    lookup: Resolve = resolve

    def deliver(self) -> None:
        """One attempt for each webhook that is due, `AT_ONCE` at most. Takes about `CALL_SECONDS` at most."""
        due = self.records.due_webhooks(AT_ONCE)
        if due:
            asyncio.run(self._deliver(due))

    async def _deliver(self, due: Sequence[WebhookRow]) -> None:
        problems = await asyncio.gather(*(self._attempt(row) for row in due))
        for row, problem in zip(due, problems, strict=True):
            attempts = row.attempts + 1
            is_over = problem is None or attempts > len(BACKOFF_SECONDS)
            wait = None if is_over else timedelta(seconds=BACKOFF_SECONDS[row.attempts])
            outcome = "delivered" if problem is None else f"given up: {problem}" if is_over else problem
            self.records.record_delivery(
                row.id, attempts, outcome, None if wait is None else self.records.clock() + wait
            )

    async def _attempt(self, row: WebhookRow) -> str | None:
        """What went wrong; None if the receiver has accepted it."""
        secret = next((one.secret for one in self.settings.webhooks if one.url == row.url), None)
        if secret is None:
            return "this address is no longer among the settings"
        try:
            async with asyncio.timeout(CALL_SECONDS):
                private = self.settings.private_webhooks
                looking_up = partial(allowed_address, row.url, private, self.lookup)
                address = await asyncio.get_running_loop().run_in_executor(_LOOKUPS, looking_up)
                status = await _call(row, address, secret.get_secret_value(), self.records.clock())
        except TimeoutError:
            return f"no answer within {CALL_SECONDS:g} s"
        except (ForbiddenAddressError, OSError, httpx.HTTPError) as error:
            return first_line(error) or type(error).__name__
        return None if 200 <= status < 300 else f"HTTP {status}"


async def _call(row: WebhookRow, address: str, secret: str, now: datetime) -> int:
    url = httpx.URL(row.url)
    timestamp = int(now.timestamp())
    headers = {
        "host": url.netloc.decode(),
        "content-type": "application/json",
        "user-agent": "ft_service-webhooks",
        "webhook-id": row.id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, row.id, timestamp, row.payload),
    }
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=CALL_SECONDS) as client,
        client.stream(
            "POST",
            url.copy_with(host=address),
            content=row.payload.encode(),
            headers=headers,
            extensions={"sni_hostname": url.host},
        ) as response,
    ):
        return response.status_code
