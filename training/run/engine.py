"""Model + optimizer -> DeepSpeed engine. The only call of `deepspeed.initialize`."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import nn

from cluster.config import ConfigError
from optim import rules
from optim.groups import Member, attention_splits, by_norm, partition
from optim.noise import Noise
from optim.rules import Rule
from optim.step.gradients import accumulate_in_fp32
from optim.step.layout import quiet_deepspeed
from optim.step.zero import ZeroOptimizer
from training.config import TrainConfig
from training.model import attention
from training.model.llama import Layer, Llama, compile_layers, initialize
from training.model.shapes import LlamaShape
from training.optim_config import SCION_RULES, MatrixOptimConfig, OptimConfig, parse_norm_entry
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
        resolve_shape(config), batch=config.batch.micro_sequences, length=config.batch.sequence_length,
        dtype=DTYPES[config.precision], device=device, documents=config.batch.document_masks,
    )  # fmt: skip


def make_rules(optim: OptimConfig) -> dict[str, Rule]:
    """The rule of each label (`optim.groups.Member.label`).

    A label is "table", "vector" or "matrix", under Scion's rules a norm; with a pattern of `optim.by_name`
    the rule or norm and that pattern.
    """
    vector, found = optim.vector, {}
    if optim.matrix.rule not in SCION_RULES:
        adam = {name: getattr(vector, name) for name in ("beta1", "beta2", "eps")}
        found["table"] = rules.adamw(**adam, weight_decay=vector.weight_decay)
        found["vector"] = rules.adamw(**adam)
    for label, (matrix, norm) in _matrix_labels(optim).items():
        found[label] = _matrix_rule(optim, matrix, norm)
    pairs = optim.gradients_per_update == 2
    return {
        label: rules.paired(rule) if pairs and rule.gradients_per_update == 1 else rule
        for label, rule in found.items()
    }


def _matrix_labels(optim: OptimConfig) -> dict[str, tuple[MatrixOptimConfig, str]]:
    """Label -> keys, and the norm of a rule of Scion's, of everything but AdamW's tables and vectors."""
    found: dict[str, tuple[MatrixOptimConfig, str]] = {}
    for pattern, matrix in optim.matrices.items():
        if matrix.rule in SCION_RULES:
            found |= {_label(pattern, norm): (matrix, norm) for _, norm in norm_patterns(optim)}
        else:
            found[_label(pattern, matrix.rule if pattern else "matrix")] = matrix, ""
    return found


def _label(pattern: str, name: str) -> str:
    return f"{name} ({pattern})" if pattern else name


def _matrix_rule(optim: OptimConfig, matrix: MatrixOptimConfig, norm: str) -> Rule:
    """norm: norm or norm@radius, for Scion's rules."""
    dtype, name, lines = DTYPES[matrix.dtype], matrix.rule, matrix.lines
    common: dict[str, Any] = {"name": name, "weight_decay": matrix.weight_decay, "dtype": dtype}
    common["cautious"] = matrix.cautious
    average = {**common, "momentum": matrix.momentum}
    polar = {**average, "method": matrix.method, "polar_steps": matrix.polar_steps}
    muon = {**polar, "nesterov": matrix.nesterov, "update_scale": matrix.scale}
    if name in SCION_RULES:
        _, ball, radius = parse_norm_entry(f"={norm}")
        rule = rules.scion(**polar, norm=ball, radius=radius, constrained=optim.scion.constrained)
    elif name == "normuon":
        muon |= {each: getattr(matrix, f"row_{each}") for each in ("beta2", "alpha", "divisor", "length")}
        rule = rules.normuon(**muon, lines=lines)
    elif name in ("muon_plus", "muon_eq", "aurora"):
        rule = getattr(rules, name)(**muon, lines=lines)
    elif name == "mars":
        rule = rules.mars(**muon, strength=matrix.correction)
    elif name == "adamw":
        adam = {each: getattr(optim.vector, each) for each in ("beta1", "beta2", "eps")}
        rule = rules.adamw(**common, **adam)
    elif name in ("sgd", "signum"):
        rule = getattr(rules, name)(**average)
    else:
        rule = rules.muon(**muon)
    rule = rules.warm_started(rule) if matrix.warm_start else rule
    ramp: dict[str, Any] = {"ramp_steps": matrix.ramp_steps}
    if matrix.looks == "transport":
        scion = optim.scion
        ramp["peak_lr"] = matrix.lr if scion.transport_scheduled else None
        return rules.transported(rule, transport=scion.transport, cap=scion.transport_cap, **ramp)
    if matrix.looks == "ema_nesterov":
        ramp |= {name: getattr(matrix, name) for name in ("lookahead", "velocity_decay")}
        return rules.ema_nesterov(rule, **ramp)
    return rule


def norm_patterns(optim: OptimConfig) -> list[tuple[str, str]]:
    """(pattern of names, label), in the order in which they are tried. A label is norm or norm@radius."""
    return [(pattern, label) for pattern, _, label in (entry.partition("=") for entry in optim.scion.norms)]


def assign(
    optim: OptimConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    splits: Mapping[str, tuple[int, ...]],
) -> list[Member]:
    """Every trainable parameter, with the label of its rule in `make_rules`.

    Raises:
        ConfigError: no pattern of `optim.scion.norms` matches a parameter, or as `OptimConfig.pattern_of`.
    """
    members = partition(named_parameters, splits=splits)
    patterns = optim.pattern_of(member.name for member in members if member.kind == "matrix")
    found = []
    for member in members:
        pattern = patterns.get(member.name, "")
        if optim.matrices[pattern].rule in SCION_RULES:
            try:
                [member] = by_norm([member], norm_patterns(optim))
            except ValueError as error:
                problem = f"{error}; add '*=spectral' or another norm for it"
                raise ConfigError(f"optim.scion.norms: {problem}") from error
            found.append(replace(member, rule=_label(pattern, member.rule)))
        else:
            found.append(
                replace(member, rule=_label(pattern, optim.matrices[pattern].rule) if pattern else "")
            )
    return found


def peak_lrs(optim: OptimConfig) -> dict[str, float]:
    """The peak learning rate of each label of `make_rules`."""
    of_matrices = {label: matrix.lr for label, (matrix, _) in _matrix_labels(optim).items()}
    vectors = () if optim.matrix.rule in SCION_RULES else ("table", "vector")
    return dict.fromkeys(vectors, optim.vector.lr) | of_matrices


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
        average_decay=config.optim.average_decay,
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
