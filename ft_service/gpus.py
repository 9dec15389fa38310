"""GPU types as facts, by the names Ray gives them (``accelerator_type:H100``)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory in GiB (2^30), as the driver reports it, and its peak dense bf16 rate in TFLOP/s (datasheets)."""

    name: str
    memory_gib: float
    bf16_tflops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 15.0, 65.0),  # no bf16: its fp16 rate
        Gpu("V100", 16.0, 125.0),  # likewise
        Gpu("A10G", 22.5, 70.0),
        Gpu("L4", 22.5, 121.0),
        Gpu("A100", 40.0, 312.0),
        Gpu("A100-40G", 40.0, 312.0),
        Gpu("A100-80G", 80.0, 312.0),
        Gpu("L40S", 45.0, 362.0),
        Gpu("H100", 79.6, 989.0),
        Gpu("H200", 140.4, 989.0),
        Gpu("B200", 179.0, 2250.0),
    )
}
