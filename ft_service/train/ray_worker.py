"""What Ray Train runs in the process of a worker.

Ray imports this module before the worker's own imports are prepared, so it imports nothing but Ray Train itself.
"""

import os
import socket
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

Config = dict[str, str]
"""Storage, run id, token of the driver's lease, and method."""


def work(config: Config) -> None:
    """Train, as one of the workers of an attempt."""
    from ft_service.cluster.ray_cluster import this_node_id
    from ft_service.cluster.storage_metrics import export_storage_metrics
    from ft_service.model.light_imports import light_imports

    export_storage_metrics()

    with light_imports(four_bit=config["method"] == "qlora"):
        from ft_service.train.parallel import import_deepspeed, leave_process_group
        from ft_service.train.worker import run_worker

        import_deepspeed(os.environ["DS_ACCELERATOR"] == "cuda")

    # Metrics go to storage, not to ray.train.report, which would log those of every worker and keep none.
    run_worker(config["storage"], config["run_id"], config["driver"], this_node_id())
    leave_process_group()


class ProcessGroup(BackendConfig):
    """Ray Train's part in the process group: each worker learns its rank, and where rank 0 is.

    The worker itself joins the group (`init_process_group`). With Ray's `TorchConfig`, driver and controller would
    import torch, and Ray would wait up to 30 seconds for a worker that does not answer to leave the group.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _reserve_address)
        worker_group.execute(_set_environment, address, port)


_reserved: list[socket.socket] = []
"""Holds a port until this process ends."""


def _reserve_address() -> tuple[str, int]:
    """An address for rank 0's store, which opens only after this process has imported torch.

    Until then nobody else is given the port. The store can still open it, because both sides set `SO_REUSEADDR`, and
    this one does not listen.
    """
    address = ray.util.get_node_ip_address()
    held = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    _reserved.append(held)
    return address, int(held.getsockname()[1])


def _set_environment(address: str, port: int) -> None:
    """The variables of torchrun."""
    context = ray.train.get_context()
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    os.environ["NODE_RANK"] = str(context.get_node_rank())
    if "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:  # as Ray's `TorchConfig`: abort NCCL when a collective fails
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
