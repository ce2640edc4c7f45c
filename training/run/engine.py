"""Model + optimizer -> DeepSpeed engine. The only call of `deepspeed.initialize`."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import inf
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import nn

from cluster.config import ConfigError
from optim.groups import Member, attention_splits, by_norm, partition
from optim.noise import Noise
from optim.rules import (
    AdamW,
    EmaNesterov,
    Muon,
    MuonPlus,
    NorMuon,
    Rule,
    Scion,
    Sgd,
    Signum,
    TransportedScion,
)
from optim.step.gradients import accumulate_in_fp32
from optim.step.layout import quiet_deepspeed
from optim.step.zero import ZeroOptimizer
from training.config import SCION_RULES, OptimConfig, TrainConfig, parse_norm_entry
from training.model import attention
from training.model.llama import Layer, Llama, compile_layers, initialize
from training.model.shapes import LlamaShape
from training.plan import resolve_shape
from training.planner.memory import compiles, loss_tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def deepspeed_config(config: TrainConfig, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: everything that is not named is DeepSpeed's default.

    Gradients accumulate in fp32, except in stage 0 with bf16, where DeepSpeed offers bf16 only.
    """
    bf16, stage, bucket = config.is_bf16, config.zero.stage, config.zero.bucket_elements
    sent = config.zero.communication_dtype
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": config.workers.gpu,
        "contiguous_gradients": True,
        "round_robin_gradients": False,  # breaks the shard addresses that optim/step/layout.py reads
    }
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.workers.gpu}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 20 * bucket}
    if stage == 3 and compiles(config):  # a layer's weights are gathered outside of its compiled frames
        zero |= {"leaf_module": {"classes": [f"{Layer.__module__}.{Layer.__qualname__}"]}}
        zero |= {"memory_efficient_linear": False}  # it would put a function of DeepSpeed's into them
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # In stage 0 DeepSpeed would hide the norm before clipping, so optim/step/zero.py clips there.
        "gradient_clipping": config.optim.clip if stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"} if stage or not bf16 else {},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload: ours, not DeepSpeed's Adam
        "communication_data_type": None if sent == "auto" else sent,
        "steps_per_print": None,
    }


def zero_init(config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
    """The context in which to build the model: `deepspeed.zero.Init` when `zero.init` asks for it."""
    if not config.zero.init:
        return contextlib.nullcontext()
    # No dtype argument: where fp16 is not supported DeepSpeed 0.19.8 ignores it and rounds to bf16
    # (`dtype or fp16 if supported else bf16`); the precision that the configuration names is kept.
    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, micro_batch=1, accumulation=1))


def build_model(config: TrainConfig, shape: LlamaShape, *, device: torch.device) -> Llama:
    """The model at its initial weights; on a GPU these are drawn there, which is faster."""
    with zero_init(config), device:
        model = Llama(shape, activation_checkpointing=config.model.recomputed_every)
    initialize(model, seed=config.run.seed)
    model.lm_head.loss_tokens, model.lm_head.z_loss = loss_tokens(config), config.optim.z_loss
    if compiles(config):
        compile_layers(model)
    return model


def warm_up(module: Llama, batch: tuple[Any, ...]) -> None:
    """Compile the layers for `batch`, the model's arguments in one pass. Nothing else changes.

    Only the embedding's gradient is asked for, so nothing accumulates; it lies behind all others. Not for
    stage 3, whose hooks cannot run without accumulating.
    """
    module.train()
    torch.autograd.grad(module(*batch), module.model.embed_tokens.weight)


def describe_compilation(config: TrainConfig, seconds: Mapping[str, float]) -> str:
    """A line for people, or none. seconds: of the parts of the start, with "compile" after `warm_up`."""
    if not compiles(config):
        return ""
    took = f"took {seconds['compile']:.1f} s" if "compile" in seconds else "happens in the first step"
    return f"  compiling the layers {took}\n"


def attention_kernel(config: TrainConfig, *, device: torch.device) -> str:
    """`training.model.attention.kernel` of a run on this device."""
    return attention.kernel(
        resolve_shape(config), length=config.batch.sequence_length, dtype=DTYPES[config.precision],
        device=device, documents=config.batch.document_masks,
    )  # fmt: skip


def make_rules(optim: OptimConfig) -> dict[str, Rule]:
    """The rule of each label (`optim.groups.Member.label`): of each kind, or under Scion of each norm."""
    matrix, vector = optim.matrix, optim.vector
    common: dict[str, Any] = {name: getattr(matrix, name) for name in ("momentum", "weight_decay")}
    common["dtype"] = DTYPES[matrix.dtype]
    if matrix.rule in SCION_RULES:
        return {label: _scion(optim, label, **common) for _, label in norm_patterns(optim)}
    adamw = partial(AdamW, beta1=vector.beta1, beta2=vector.beta2, eps=vector.eps)
    muon: dict[str, Any] = {**common, "nesterov": matrix.nesterov, "method": matrix.method}
    muon["update_scale"] = matrix.scale
    ahead = {name: getattr(matrix, name) for name in ("lookahead", "velocity_decay", "ramp_steps")}
    makers: dict[str, Callable[[], Rule]] = {
        "muon": lambda: Muon(**muon),
        "normuon": lambda: NorMuon(**muon, beta2=matrix.row_beta2),
        "muon_plus": lambda: MuonPlus(**muon, lines=matrix.lines),
        "ema_nesterov": lambda: EmaNesterov(**muon, **ahead),
        "adamw": lambda: adamw(weight_decay=matrix.weight_decay),
        "sgd": lambda: Sgd(**common),
        "signum": lambda: Signum(**common),
    }
    return {
        "table": adamw(weight_decay=vector.weight_decay),
        "vector": adamw(),
        "matrix": makers[matrix.rule](),
    }


def norm_patterns(optim: OptimConfig) -> list[tuple[str, str]]:
    """(pattern of names, label), in the order in which they are tried. A label is norm or norm@radius."""
    return [(pattern, label) for pattern, _, label in (entry.partition("=") for entry in optim.scion.norms)]


def _scion(optim: OptimConfig, label: str, **common: Any) -> Rule:
    matrix, scion = optim.matrix, optim.scion
    _, norm, radius = parse_norm_entry(f"={label}")
    common |= {"method": matrix.method, "norm": norm, "radius": radius, "constrained": scion.constrained}
    if matrix.rule == "scion":
        return Scion(**common)
    cap, ramp_steps = scion.transport_cap, matrix.ramp_steps
    return TransportedScion(**common, transport=scion.transport, cap=cap, ramp_steps=ramp_steps)


def assign(
    optim: OptimConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    splits: Mapping[str, tuple[int, ...]],
) -> list[Member]:
    """Every trainable parameter, with the label of its rule in `make_rules`.

    Raises:
        ConfigError: no pattern of `optim.scion.norms` matches a parameter.
    """
    members = partition(named_parameters, splits=splits)
    if optim.matrix.rule not in SCION_RULES:
        return members
    try:
        return by_norm(members, norm_patterns(optim))
    except ValueError as error:
        raise ConfigError(f"optim.scion.norms: {error}; add '*=spectral' or another norm for it") from error


def peak_lrs(optim: OptimConfig) -> dict[str, float]:
    """The peak learning rate of each label."""
    others = dict.fromkeys(("table", "vector"), optim.vector.lr)
    return {label: others.get(label, optim.matrix.lr) for label in make_rules(optim)}


def make_noise(config: TrainConfig) -> tuple[Noise, int] | None:
    """The noise to inject and its seed, which is the run's."""
    noise = config.optim.noise
    if noise.inject == "none":
        return None
    tail = inf if noise.inject == "gaussian" else noise.tail
    return Noise(noise.inject, tail=tail, moment=noise.moment, scale=noise.scale), config.run.seed


def build_deepspeed_engine(
    model: nn.Module, config: TrainConfig, *, micro_batch: int, accumulation: int
) -> tuple["deepspeed.DeepSpeedEngine", ZeroOptimizer, list[Member]]:
    """Wrap the model. Returns the engine, the bound optimizer, and the partition of the parameters."""
    quiet_deepspeed()
    # DeepSpeed imports its own Muon, which is not used here and would import torch's compiler.
    compiler.compile = lambda: compiler.dummy_decorator
    shape = resolve_shape(config)
    splits = attention_splits(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        per_head=config.optim.matrix.per_head,
    )
    members = assign(config.optim, model.named_parameters(), splits=splits)
    optimizer = ZeroOptimizer(
        members,
        rules=make_rules(config.optim),
        peak_lr=peak_lrs(config.optim),
        clip=config.optim.clip,
        noise=make_noise(config),
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, micro_batch=micro_batch, accumulation=accumulation),
        dist_init_required=False,
    )
    accumulate_in_fp32(engine, bucket_elements=config.zero.bucket_elements)
    optimizer.bind(engine)
    return engine, optimizer, members
