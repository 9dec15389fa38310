"""Why workers died, and the cure that fits the cause.

Libraries report the same cause by many types and texts, so both are searched. The first cause that matches counts.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from ft_service.errors import TrainingError
from ft_service.text import error_line

_RAY_EXIT_DETAIL = re.compile(r"Worker exit detail: *(.+)")


@dataclass(frozen=True)
class DeathReason:
    """Why workers died; equal for deaths of the same kind."""

    source: Literal["worker", "ray"]
    """A worker's exception, or Ray's failure to run the workers."""
    exception: str = ""
    """Type name of a worker's exception."""
    text: str = field(default="", compare=False)
    """The whole text of the exception."""

    @property
    def cure(self) -> str:
        """What to do about this cause."""
        described = f"{self.exception}: {self.text}"
        default = _RAY_CURE if self.source == "ray" else _UNKNOWN_CURE
        return next((cure for pattern, cure in _CURES if re.search(pattern, described)), default)


RAY_FAILED = DeathReason("ray")

HANG_CURE = (
    "Compare the stacks of the workers: the one that waits for nothing is at fault. If the step is only slow, raise "
    "parallel.hang_timeout_seconds."
)
_RAY_CURE = "Look at `ray status` and the log of the Ray Train controller for what Ray could not start."
_UNKNOWN_CURE = (
    "Another attempt would fail again. Read the traceback: its last lines name the library and the call. If they are "
    "in ft_service, please report it."
)
_CURES: tuple[tuple[str, str], ...] = (
    (
        r"\bMemoryError|(?i:running low on memory|memory monitor|cannot allocate memory|DefaultCPUAllocator)",
        "The main memory of the node is used up. Run fewer workers per node, use nodes with more memory, or avoid "
        "parallel.offload: cpu; lower train.micro_batch_size if the workers train on CPU.",
    ),
    (
        r"OutOfMemoryError|(?i:out of memory)|CUBLAS_STATUS_ALLOC_FAILED",
        "The memory of the GPU is used up. Lower train.micro_batch_size, set train.activation_checkpointing: true, or "
        "use parallel.zero_stage: 3 or parallel.offload: cpu.",
    ),
    (
        r"(?i)no space left on device|disk quota exceeded|OutOfDiskError",
        "A disk is full. Free space on that node (its temporary folder, and the cache of downloaded bases), or on the "
        "storage root.",
    ),
    (
        r"ModuleNotFoundError|ImportError",
        "A package is missing or does not load on a node. Install the same packages on all nodes: pip install "
        "--constraint constraints.txt, then check with ft doctor.",
    ),
    (
        r"(?i)error building extension|CUDA_HOME|ninja is required|CUDAMismatchException|CompileException",
        "DeepSpeed could not compile an operator on a node. Install a compiler and the CUDA toolkit of torch's CUDA "
        "version there, then check with ft doctor.",
    ),
    (
        r"FileNotFoundError|NotADirectoryError|PermissionError",
        "Every node must be able to read and write the paths of the spec at the same place. Mount them on all nodes, "
        "or use object storage.",
    ),
    (
        r"StorageError|UnreachableError|ModelUnreachableError",
        "The storage root or the source of the base does not answer that node. Check its network and credentials with "
        "ft doctor.",
    ),
    (
        r"(?i)NCCL|Dist(Backend|Network|Store)Error|gloo|connection (closed by peer|reset|refused)|socket",
        "The workers lost each other, or could not connect. Check that nodes reach each other on all ports, and name "
        "the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); NCCL_DEBUG=INFO shows what NCCL chose.",
    ),
    (
        r"(?i)AcceleratorError|CUDA error|cuDNN error|uncorrectable ECC",
        "A GPU or its driver failed. Check nvidia-smi and dmesg (Xid) on that node, and leave the node out if it shows "
        "errors.",
    ),
    (
        r"WorkerCrashedError|ActorDiedError|ActorUnavailableError|NodeDiedError|SIGKILL|SIGSEGV",
        "The process was killed or crashed without an exception. Check dmesg on that node for the kernel's "
        "out-of-memory killer (then run fewer workers per node), and the worker's log for a crash in a library.",
    ),
)


class TrainingDied(TrainingError):
    """Workers ended without an `FtError`: killed, out of memory, a lost node, an exception in a library."""

    def __init__(self, message: str, reason: DeathReason, traceback: str = "") -> None:
        super().__init__(message, reason, traceback)
        self.reason = reason
        self.traceback = traceback

    def __str__(self) -> str:
        return str(self.args[0])


def reason_line(error: BaseException) -> str:
    """Why a worker died, in one line: the error's first line, and for a dead process how it ended."""
    detail = _RAY_EXIT_DETAIL.search(str(error))
    return f"{error_line(error)} {detail.group(1)}" if detail else error_line(error)
