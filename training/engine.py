"""Model + optimizer -> DeepSpeed engine. The only call of `deepspeed.initialize`."""

import contextlib
import logging
import warnings
from typing import Any

import deepspeed
import torch
from torch import nn

from optim.groups import Member, attention_splits, partition
from optim.rules import AdamW, Muon, Rule
from optim.zero import ZeroOptimizer
from training.config import OptimConfig, TrainConfig
from training.plan import resolve_shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def quiet_deepspeed() -> None:
    """Keep DeepSpeed to errors, and from work at start-up that serves nothing here.

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


def deepspeed_config(config: TrainConfig, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: everything that is not named is DeepSpeed's default.

    Gradients accumulate in fp32, except in stage 0 with bf16, where DeepSpeed offers bf16 only.
    """
    bf16, stage, bucket = config.precision == "bf16", config.zero.stage, config.zero.bucket_elements
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": config.workers.gpu,
        "contiguous_gradients": True,
        "round_robin_gradients": False,  # breaks the shard addresses that optim/zero.py reads
    }
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.workers.gpu}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 20 * bucket}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # In stage 0 DeepSpeed would hide the norm before clipping, so optim/zero.py clips there.
        "gradient_clipping": config.optim.clip if stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"} if stage or not bf16 else {},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload: ours, not DeepSpeed's Adam
        "steps_per_print": None,
    }


def zero_init(config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
    """The context in which to build the model: `deepspeed.zero.Init` when `zero.init` asks for it."""
    if not config.zero.init:
        return contextlib.nullcontext()
    # No dtype argument: where fp16 is not supported DeepSpeed 0.19.8 ignores it and rounds to bf16
    # (`dtype or fp16 if supported else bf16`); the precision that the configuration names is kept.
    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, micro_batch=1, accumulation=1))


def make_rules(optim: OptimConfig) -> dict[str, Rule]:
    """The rule of each kind of parameter (`optim.groups.KINDS`)."""
    matrix, vector = optim.matrix, optim.vector
    betas = {"beta1": vector.beta1, "beta2": vector.beta2, "eps": vector.eps}
    rules: dict[str, Rule] = {
        "table": AdamW(**betas, weight_decay=vector.weight_decay),
        "vector": AdamW(**betas),
    }
    if matrix.rule == "muon":
        rules["matrix"] = Muon(
            momentum=matrix.momentum,
            nesterov=matrix.nesterov,
            weight_decay=matrix.weight_decay,
            method=matrix.method,
            update_scale=matrix.scale,
            dtype=DTYPES[matrix.dtype],
        )
    else:
        rules["matrix"] = AdamW(**betas, weight_decay=matrix.weight_decay)
    return rules


def make_engine(
    model: nn.Module, config: TrainConfig, *, micro_batch: int, accumulation: int
) -> tuple["deepspeed.DeepSpeedEngine", ZeroOptimizer, list[Member]]:
    """Wrap the model. Returns the engine, the bound optimizer, and the partition of the parameters."""
    quiet_deepspeed()
    shape = resolve_shape(config)
    splits = attention_splits(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        per_head=config.optim.matrix.per_head,
    )
    members = partition(model.named_parameters(), splits=splits)
    optimizer = ZeroOptimizer(
        members,
        rules=make_rules(config.optim),
        peak_lr={
            "matrix": config.optim.matrix.lr,
            "table": config.optim.vector.lr,
            "vector": config.optim.vector.lr,
        },
        clip=config.optim.clip,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, micro_batch=micro_batch, accumulation=accumulation),
        dist_init_required=False,
    )
    optimizer.bind(engine)
    return engine, optimizer, members
