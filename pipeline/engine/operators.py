"""DeepSpeed as a library: importing it, and the operators that it compiles on first use."""

import gc
import os
import shutil
from typing import Any

import torch
import torch.utils.cpp_extension

from data_prep.errors import UserError


def import_deepspeed():
    """DeepSpeed, told beforehand that there is no GPU where there is none: it would warn of that in every process."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return deepspeed


def initialize(**arguments: Any):
    """DeepSpeed's engine, by `deepspeed.initialize`; its arguments.

    While it starts it collects garbage half a dozen times, to log how much memory is used. That walks over all that has
    been imported, 0.4 s each time; so what is there before is left out of those walks.
    """
    gc.collect()
    gc.freeze()
    try:
        return import_deepspeed().initialize(**arguments)[0]
    finally:
        gc.unfreeze()


def cpu_adam():
    """DeepSpeed's Adam for offloaded state."""
    if not _has_compiler():
        raise UserError(
            "offloading the optimizer compiles DeepSpeed's CPU Adam, which needs g++ and ninja on the PATH. Install "
            'them, or set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration to use PyTorch\'s own.'
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    _load_operator(CPUAdamBuilder, "CPU Adam")
    return DeepSpeedCPUAdam


def require_async_io() -> None:
    """Refuse weights on NVMe where DeepSpeed's asynchronous reads cannot be compiled."""
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if torch.cuda.is_available() and torch.utils.cpp_extension.CUDA_HOME is None:
        raise UserError(
            "weights on NVMe need DeepSpeed's async_io, which on a machine with GPUs is compiled by the CUDA toolkit, "
            "and none is found: set CUDA_HOME to it, or keep the weights in memory: offload to cpu."
        )
    if not (_has_compiler() and AsyncIOBuilder().is_compatible(verbose=False)):
        raise UserError(
            "weights on NVMe need DeepSpeed's async_io, which is compiled from libaio with g++ and ninja. Install "
            "libaio-dev (libaio-devel on Red Hat), g++ and ninja, or keep the weights in memory: offload to cpu."
        )


def load_async_io() -> None:
    """Have DeepSpeed's asynchronous reads ready on all ranks of this machine."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    _load_operator(AsyncIOBuilder, "asynchronous reads")


def _has_compiler() -> bool:
    return bool(shutil.which("g++") and shutil.which("ninja"))


def _load_operator(builder, words: str) -> None:
    """Load one of DeepSpeed's operators; the first rank of each machine compiles it if it never was."""
    if os.environ["LOCAL_RANK"] == "0":
        print(f"loading DeepSpeed's {words}; the first time it is compiled, for some minutes", flush=True)
        builder().load(verbose=False)
    torch.distributed.barrier()
