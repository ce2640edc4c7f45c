"""DeepSpeed without its chatter, and without work at start-up that serves nothing here."""

import logging
import warnings

import torch


def quiet_deepspeed() -> None:
    """Keep DeepSpeed to errors. Call it before `deepspeed.initialize`.

    BF16_Optimizer prints a table of memory, after a garbage collection, at every turn: 2 s. On a CPU,
    `deepspeed_shm_comm` (inference collectives only) would compile for 20 to 90 s at first use, and a build
    that is killed leaves a lock that hangs every later run.
    """
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # of DeepSpeed's calls
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
