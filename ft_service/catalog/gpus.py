"""GPU types as facts, by the names Ray gives them (``accelerator_type:H100``).

Sources: NVIDIA's datasheets of each type (memory, peak rate without sparsity, memory bandwidth, NVLink, PCIe) and, for
the network, the AWS instance types that carry eight of them (g4dn, p3, g5, g6, g6e, p4d, p4de, p5, p5en, p6-b200).
"""

from dataclasses import dataclass

GPUS_PER_NODE = 8
"""In one machine, where nobody said otherwise: what clouds rent of every type here."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bandwidths are GB/s (10^9 bytes) in one direction, as sold; nobody reaches them whole."""

    name: str
    memory_gib: float
    """As the driver reports it, in GiB (2^30)."""
    bf16_tflops: float
    """Peak dense rate."""
    memory_bandwidth: float
    nvlink: float | None
    """Between two GPUs of a node; None where they meet over PCIe."""
    pcie: float
    """Between GPU and host memory."""
    network: float
    """Of a whole node, all its adapters together."""
    host_gib: float
    """Main memory of a node with eight of them."""
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
        Gpu("A10G", 22.5, 70.0, 600, None, 32, 12.5, 768),
        Gpu("L4", 22.5, 121.0, 300, None, 32, 12.5, 768),
        Gpu("A100", 40.0, 312.0, 1555, 300, 32, 50, 1152),
        Gpu("A100-40G", 40.0, 312.0, 1555, 300, 32, 50, 1152),
        Gpu("A100-80G", 80.0, 312.0, 2039, 300, 32, 50, 1152),
        Gpu("L40S", 45.0, 362.0, 864, None, 32, 50, 1536),
        Gpu("H100", 79.6, 989.0, 3350, 450, 64, 400, 2048),
        Gpu("H200", 140.4, 989.0, 4800, 450, 64, 400, 2048),
        Gpu("B200", 179.0, 2250.0, 8000, 900, 64, 400, 2048),
    )
}
_ALSO_CALLED = {"H100-80G": "H100", "H200-141G": "H200", "A10": "A10G"}


def find_gpu(name: str | None) -> Gpu | None:
    """The type of that name, whatever its case; None if it is not known."""
    known = {gpu.lower(): gpu for gpu in GPUS} | {other.lower(): gpu for other, gpu in _ALSO_CALLED.items()}
    return GPUS[known[name.lower()]] if name and name.lower() in known else None
