"""A headless Chromium for tests of pages, and a server for them in a thread of this process."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from fastapi import FastAPI

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = "chromium"
WAIT_MILLISECONDS = 20_000


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Debian's Chromium, driven by playwright. Skips the test where there is none; in CI that is a failure."""
    path = shutil.which(CHROMIUM)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{CHROMIUM} is not installed, and .ci/run installs it")
        pytest.skip(f"{CHROMIUM} is not installed (Debian: apt install {CHROMIUM})")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_at(browser: "Browser", address: str, **options: Any) -> Iterator["Page"]:
    """A page in a context of its own: English, in a window of a desk. Fails on errors of scripts and of the policy."""
    context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.set_default_timeout(WAIT_MILLISECONDS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    page.goto(address)
    try:
        yield page
    finally:
        context.close()
    assert problems == []


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The address of an application on a port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
