"""Counts the copies of a checkpoint's tensors that exist at a time."""

import threading
import weakref
from typing import Any

import pytest
import torch


class Staged:
    """Bytes of the copies, now and at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        self.peak = 0
        self._lock = threading.RLock()
        to = torch.Tensor.to

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            copy = to(tensor, *args, **kwargs)
            if kwargs.get("copy"):
                weakref.finalize(copy, self._add, -copy.nbytes)
                self._add(copy.nbytes)
            return copy

        monkeypatch.setattr(torch.Tensor, "to", counted)

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)
