"""A cable that takes time: it passes Ethernet frames between two network devices, each frame after a delay.

    python -m tests.delayed_cable NEAR FAR SECONDS

It makes the two devices (TAP) in the network namespace in which it runs, prints a line, and works until it is killed;
the devices are then gone.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_LARGEST_FRAME = 65536 + 14


def main(near: str, far: str, seconds: float) -> None:
    ends = (_device(near), _device(far))
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    on_the_way: deque[tuple[float, int, bytes]] = deque()  # all take equally long, so they arrive as they have left
    print("up", flush=True)
    while True:
        wait = max(on_the_way[0][0] - time.monotonic(), 0.0) if on_the_way else None
        for device in select.select(ends, [], [], wait)[0]:
            for frame in _frames(device):
                on_the_way.append((time.monotonic() + seconds, other[device], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, device, frame = on_the_way.popleft()
            try:
                os.write(device, frame)
            except OSError:  # the device is down, or its queue is full: the frame is lost
                continue


def _device(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return device


def _frames(device: int) -> list[bytes]:
    """What has arrived."""
    found = []
    try:
        while len(found) < 256:
            found.append(os.read(device, _LARGEST_FRAME))
    except OSError:  # BlockingIOError: no more; any other: the device is down
        pass
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
