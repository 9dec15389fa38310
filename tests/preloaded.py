"""What the fork server of `tests.forked` imports once, for all worker processes that it forks.

Nothing here may start a thread, join a process group or touch a GPU: a fork would inherit half of it.
"""

import gc
import importlib

import tqdm
from deepspeed.accelerator import get_accelerator

from ft_service.train.parallel import import_deepspeed, prepare_process

prepare_process(use_gpu=False)
import_deepspeed(use_gpu=False)
for _module in (
    "ft_service.train.parallel_placement",
    "ft_service.train.worker",
    "peft.tuners.lora.bnb",
    "tests.model.loading_cases",
    "tests.plan.memory_cases",
    "tests.train.gathered_cases",
    "tests.train.nonfinite_cases",
    "tests.train.training_cases",
    "tests.train.watchdog_cases",
    "tests.train.writing_cases",
):
    importlib.import_module(_module)
# Each worker would otherwise ask ninja whether the operator is still built.
get_accelerator().create_op_builder("ShareMemCommBuilder").load()
tqdm.tqdm.get_lock()  # a lock that a worker makes is leaked where the worker is killed
gc.collect()
gc.freeze()  # a garbage collection in a worker would copy all these pages
