"""GPU types, by Ray's names for them (``accelerator_type:H100``).

Sources: NVIDIA's datasheets (memory, peak rate without sparsity, memory bandwidth, NVLink, PCIe) and, for network and
main memory, the AWS instance types with eight of them (g4dn, p3, g5, g6, g6e, p4d, p4de, p5, p5en, p6-b200, p6-b300).
Peak rates of GeForce and RTX cards are those with fp32 accumulation, from the architecture whitepapers (Ampere GA102,
Ada, Blackwell). For cards that no such instance has, a node is assumed to have 64 GiB of main memory for each GPU, and
a network of 10 Gbit/s (GeForce, RTX) or 100 Gbit/s.
"""

import difflib
import re
from dataclasses import dataclass

GPUS_PER_NODE = 8
"""Default number of GPUs in one machine: the usual cloud machine of every type listed here."""


@dataclass(frozen=True)
class Gpu:
    """One GPU type. Bandwidths are nominal, in GB/s (10^9 bytes) and one direction."""

    name: str
    memory_gib: float
    """Memory that the driver reports, in GiB (2^30); for H100 what torch reports, which is half a GiB less."""
    bf16_tflops: float
    """Peak dense rate."""
    memory_bandwidth: float
    nvlink: float | None
    """Between two GPUs of a node; None if they are connected over PCIe."""
    pcie: float
    """Between GPU and host memory."""
    network: float
    """Of a whole node, over all its network adapters."""
    host_gib: float
    """Main memory of a node with eight of these GPUs, in GiB."""
    has_bf16: bool = True

    @property
    def peer(self) -> float:
        """GB/s between GPUs of a node."""
        return self.nvlink or self.pcie


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 15.0, 65.0, 320, None, 16, 12.5, 384, has_bf16=False),  # its fp16 rate
        Gpu("V100", 16.0, 125.0, 900, 150, 16, 3.1, 488, has_bf16=False),  # likewise
        Gpu("A10", 22.5, 125.0, 600, None, 32, 12.5, 512),
        Gpu("A10G", 22.5, 70.0, 600, None, 32, 12.5, 768),
        Gpu("L4", 22.5, 121.0, 300, None, 32, 12.5, 768),
        Gpu("A100", 40.0, 312.0, 1555, 300, 32, 50, 1152),
        Gpu("A100-40G", 40.0, 312.0, 1555, 300, 32, 50, 1152),
        Gpu("A100-80G", 80.0, 312.0, 2039, 300, 32, 50, 1152),
        Gpu("A30", 24.0, 165.0, 933, None, 32, 12.5, 512),
        Gpu("A40", 45.0, 149.7, 696, None, 32, 12.5, 512),
        Gpu("L40", 45.0, 181.0, 864, None, 32, 12.5, 512),
        Gpu("L40S", 45.0, 362.0, 864, None, 32, 50, 1536),
        Gpu("H100", 79.1, 989.0, 3350, 450, 64, 400, 2048),
        Gpu("H20", 95.5, 148.0, 4000, 450, 64, 50, 512),
        Gpu("H200", 140.4, 989.0, 4800, 450, 64, 400, 2048),
        Gpu("B200", 179.0, 2250.0, 8000, 900, 64, 400, 2048),
        Gpu("B300", 268.0, 2250.0, 8000, 900, 64, 800, 4096),
        Gpu("GeForce-RTX-3090", 24.0, 71.0, 936, None, 32, 1.25, 512),
        Gpu("GeForce-RTX-4090", 23.9, 165.2, 1008, None, 32, 1.25, 512),
        Gpu("GeForce-RTX-5090", 31.8, 209.5, 1792, None, 64, 1.25, 512),
        Gpu("RTX-A6000", 47.9, 154.8, 768, None, 32, 1.25, 512),
        Gpu("RTX-6000", 47.9, 364.2, 960, None, 32, 1.25, 512),  # the Ada generation
        Gpu("RTX-PRO-6000", 95.5, 503.8, 1792, None, 64, 1.25, 512),  # Blackwell
    )
}
_ALIASES = {
    "H100-80G": "H100",
    "H200-141G": "H200",
    "V100-16G": "V100",
    "3090": "GeForce-RTX-3090",
    "4090": "GeForce-RTX-4090",
    "5090": "GeForce-RTX-5090",
    "A6000": "RTX-A6000",
    "RTX-6000-Ada": "RTX-6000",
}
_LEFT_OUT_OF_NAMES = re.compile(r"^(nvidia|tesla|geforce)+|sxm\d?|hbm\de?|generation$|(?<=\dg)b")
"""Maker and family in front, socket, kind of memory, the B of GB: drivers and shops write them, Ray does not."""


def _plain(name: str) -> str:
    """``rtx4090`` for ``NVIDIA GeForce RTX 4090``; ``a10080g`` for ``A100-SXM4-80GB``."""
    return _LEFT_OUT_OF_NAMES.sub("", re.sub(r"[-_ ]", "", name.lower()))


_BY_PLAIN_NAME = {_plain(name): name for name in GPUS} | {_plain(alias): name for alias, name in _ALIASES.items()}


def find_gpu(name: str | None) -> Gpu | None:
    """The type with this name, however it is written (``RTX 4090``, ``NVIDIA A100-SXM4-80GB``); None if unknown."""
    known = _BY_PLAIN_NAME.get(_plain(name)) if name else None
    return GPUS[known] if known else None


def known_gpus(name: str) -> str:
    """For errors about an unknown type: the closest name, if any, and all of them."""
    close = difflib.get_close_matches(_plain(name), _BY_PLAIN_NAME, n=1)
    guess = f"Did you mean {_BY_PLAIN_NAME[close[0]]}? " if close else ""
    return f"{guess}Known types: {', '.join(GPUS)}."
