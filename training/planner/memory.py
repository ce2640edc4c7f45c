"""Memory of one worker at each point of a step, by part. No torch.

What lies side by side at one point is added; the run needs the largest of the points. h: hidden size,
p: bytes of an element of the model.

    after load      weights; masters and state; fp32 gradients where they are allocated once; the buffers in
                    which matrices travel and are orthogonalised
    forward         beside these: what the layers keep for the backward pass, and the logits
    backward        the largest of four places: the loss; the last layer; the first layer, when only its own
                    activations are left; the embedding, when all gradients are there and no activations
    exchange        gradients on their way between workers, activations gone
    optimizer step  what the step holds for a moment

Not counted: where `precision=bf16` is asked of a CPU without bf16 arithmetic, the wide copies of matrices and
of their inputs that the backward pass needs.

Compared with peaks on an H200 and on a CPU: tests/training/planner/test_memory.py. Read in DeepSpeed 0.19.8.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from optim.cost import GROUP_BYTES, uses_gram
from training.config import TrainConfig
from training.model.shapes import LlamaShape
from training.optim_config import MUON_RULES, SCION_RULES, MatrixOptimConfig

POINTS = ("after load", "forward", "backward", "exchange", "optimizer step")
OUTSIDE = "CUDA, NCCL, fragments"
CONTEXT_BYTES = 1.0e9  # CUDA's context and NCCL's buffers, which torch does not count: an allowance
# Of tests/baselines/nvidia-h200_gpu.json as of commit 27a28c0: torch reserved 51.4 GB for 49.5 GB allocated.
FRAGMENT_SHARE = 0.04
WORKSPACE_BYTES = 7e7  # of cuBLAS and cuDNN, within torch's memory: that file's block 5, each micro-batch
LOSS_TOKENS = 4096  # of `model.loss_tokens` by default: 0.4 GB of bf16 logits at a vocabulary of 50,304

Parts = dict[str, int]


@dataclass(frozen=True)
class Form:
    """How a micro-batch is computed.

    Attributes:
        width: bytes of an element of weights and activations, 2 or 4.
        compiled: layers compiled by torch, which keeps less for the backward pass.
        checkpointing: every N-th layer, from the first, keeps only its input; 0: none does.
        chunk_tokens: the loss is computed for this many tokens at a time; None: for all at once.
    """

    width: int
    compiled: bool = False
    checkpointing: int = 0
    chunk_tokens: int | None = None

    def recomputed(self, num_layers: int) -> int:
        """Layers that are computed again in the backward pass."""
        return -(-num_layers // self.checkpointing) if self.checkpointing else 0


@dataclass(frozen=True)
class Memory:
    """`points`: point of the step -> part -> bytes of one worker, on its device."""

    points: dict[str, Parts]

    @property
    def largest(self) -> str:
        """The point that needs the most."""
        return max(self.points, key=lambda point: sum(self.points[point].values()))

    @property
    def parts(self) -> Parts:
        """Part -> bytes, at the largest point."""
        return self.points[self.largest]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes of the largest point that torch's allocator counts: without CUDA's own."""
        return self.total - self.parts.get(OUTSIDE, 0)


def compiles(config: TrainConfig) -> bool:
    """Whether torch.compile compiles layers and loss: `model.compile`, or on GPUs."""
    return config.workers.gpu if config.model.compile is None else config.model.compile


def loss_tokens(config: TrainConfig) -> int | None:
    """Tokens whose logits exist at one time: `model.loss_tokens`, by default LOSS_TOKENS; None: all."""
    return LOSS_TOKENS if config.model.loss_tokens is None else config.model.loss_tokens or None


def form_of(config: TrainConfig) -> Form:
    """The form that the configuration asks for."""
    return Form(
        width=2 if config.is_bf16 else 4,
        compiled=compiles(config),
        checkpointing=config.model.recomputed_every,
        chunk_tokens=loss_tokens(config),
    )


def memory(config: TrainConfig, shape: LlamaShape, *, num_workers: int) -> Memory:
    """Bytes of one worker at every point of a step, in the last of its micro-batches."""
    form, stage, n = form_of(config), config.zero.stage, shape.num_parameters
    tokens = config.batch.micro_sequences * config.batch.sequence_length
    accumulates = config.batch.tokens > num_workers * tokens
    resident = _resident(config, shape, num_workers=num_workers)
    # The model's own gradients. Stages 2 and 3 reduce each at once, and so does optim/step/gradients.py.
    low = n * form.width if stage == 0 or (stage == 1 and not config.is_bf16) else 0
    forward, backward = activation_bytes(shape, tokens, form, gradients=0 if accumulates else low)
    earlier: Parts = {"model's gradients": low} if accumulates and low else {}
    earlier["document masks"] = mask_bytes(config)
    later: Parts = {"model's gradients": low} if low else {}
    # In fp32 DeepSpeed's stage 2 collects a pass's gradients of the worker's shard. If it accumulates, their
    # sum lies beside them.
    collected = n * 4 // num_workers if stage == 2 and not config.is_bf16 and accumulates else 0
    points = {
        "after load": resident,
        "forward": {**resident, **earlier, "activations": forward},
        "backward": {**resident, **earlier, "activations": backward, "gradients on their way": collected},
        "exchange": {**resident, **later, "gradients on their way": _sent_bytes(config, n, num_workers)},
        "optimizer step": {
            **resident, **later, "step": step_bytes(config, shape, num_workers=num_workers),
        },
    }  # fmt: skip
    if config.workers.gpu:
        points = {point: _with_outside(parts) for point, parts in points.items()}
    return Memory(
        {point: {name: size for name, size in parts.items() if size} for point, parts in points.items()}
    )


def mask_bytes(config: TrainConfig) -> int:
    """The mask of `training.model.attention.DocumentAttention`, for all layers. bf16 on GPUs needs none."""
    if not config.batch.document_masks or (config.workers.gpu and config.is_bf16):
        return 0
    return config.batch.micro_sequences * config.batch.sequence_length**2 * form_of(config).width


def _with_outside(parts: Parts) -> Parts:
    inside = parts | {"workspaces": int(WORKSPACE_BYTES)}
    return inside | {OUTSIDE: int(CONTEXT_BYTES + FRAGMENT_SHARE * sum(inside.values()))}


def _resident(config: TrainConfig, shape: LlamaShape, *, num_workers: int) -> Parts:
    """What stays on the device from the first step on."""
    stage, bf16, n = config.zero.stage, config.is_bf16, shape.num_parameters
    width, bucket = form_of(config).width, config.zero.bucket_elements
    shard = 1 if stage == 0 else num_workers
    gathered = min(n, 2 * bucket + max(prod(size) for size in shape.parameters().values()))
    weights = n * width
    if stage == 3:
        weights = n * width // num_workers + (gathered * width if num_workers > 1 else 0)
    gradients = {0: 0, 1: n * 4 if bf16 else 0}.get(stage, n * 4 // num_workers)
    offloaded = config.zero.offload_optimizer and config.workers.gpu
    buckets = 2 if config.workers.gpu and stage == 2 else 1  # one is sent while the next is filled
    parts = {
        "weights": weights,
        "gradients (fp32)": gradients,
        "master weights (fp32)": 0 if stage == 0 and not bf16 else n * 4 // shard,
        "momentum and moments": state_bytes(config, shape) // shard,
        "matrices on their way": 0
        if config.workers.gpu
        else _matrix_buffer_bytes(config, shape, num_workers=num_workers),
        "communication buckets": buckets * bucket * width if stage >= 2 else 0,
    }
    if offloaded:
        parts |= dict.fromkeys(("gradients (fp32)", "master weights (fp32)", "momentum and moments"), 0)
    return parts


def state_bytes(config: TrainConfig, shape: LlamaShape) -> int:
    """The optimizer's state, fp32, of all workers together."""
    others, by_norm = shape.num_parameters, config.optim.matrix.rule in SCION_RULES
    numbers = 0
    for (rows, cols), matrix in _matrix_rules(config, shape):
        numbers += rows * cols * matrix.state_numbers + matrix.num_lines(rows, cols)
        others -= rows * cols
    average = shape.num_parameters if config.optim.average_decay else 0
    return 4 * (numbers + others * (config.optim.matrix.state_numbers if by_norm else 2) + average)


def activation_bytes(shape: LlamaShape, tokens: int, form: Form, *, gradients: int = 0) -> tuple[int, int]:
    """Most bytes of activations in the forward pass and in the backward pass of one micro-batch.

    Args:
        gradients: bytes of the model's gradients that this backward pass allocates.
    """
    p, layer, kept = form.width, layer_bytes(shape, form), _kept_by_layers(shape, form)
    norm = (4 + 2 * p) * shape.hidden_size
    forward, loss = _loss_bytes(shape, tokens, form)
    table = shape.vocab_size * shape.hidden_size * p
    # In a layer's backward pass: gradients of the residual, its norm and the SwiGLU's three products, which
    # compiled kernels do not hold at once; and the last layer, where it is computed again.
    inside = (2 * shape.hidden_size + (0 if form.compiled else 3 * shape.ffn_size)) * p
    is_last_recomputed = form.checkpointing and (shape.num_layers - 1) % form.checkpointing == 0
    places = (
        tokens * (kept + norm) + loss,
        tokens * (kept + inside + (layer if is_last_recomputed else 0)) + table,
        tokens * (layer + inside) + max(gradients - table, 0),
        gradients + table,
    )
    return tokens * (kept + norm) + forward, max(places)


def kept_bytes(shape: LlamaShape, tokens: int, form: Form) -> int:
    """Bytes that autograd keeps of a forward pass, plain loss: layers, last norm, log-probabilities."""
    p = form.width
    norm = (4 + 2 * p) * shape.hidden_size
    return tokens * (_kept_by_layers(shape, form) + norm + 4 * shape.vocab_size)


def _kept_by_layers(shape: LlamaShape, form: Form) -> int:
    """Bytes for each token that all layers keep together."""
    recomputed = form.recomputed(shape.num_layers)
    inputs = recomputed * shape.hidden_size * form.width
    return inputs + (shape.num_layers - recomputed) * layer_bytes(shape, form)


def layer_bytes(shape: LlamaShape, form: Form) -> int:
    """Bytes that one layer keeps for its backward pass, for each token.

    As it is written: two norms at (4 + 2p)h; q, k, v and their mix at (2q + 2kv)p, 4 per head for the
    softmax; the SwiGLU at 4·ffn·p; norms of queries and keys at (4 + p)(q + kv). Compiled, torch keeps input,
    sum and both norms' outputs at 4hp, queries and keys before their norms at (q + kv)p, and does not keep
    silu(gate): 3·ffn·p.
    """
    p, hidden = form.width, shape.hidden_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention, roots = (2 * q + 2 * kv) * p + 4 * shape.num_heads, 2 * 4
    if shape.qk_norm:
        attention += (q + kv) * (p if form.compiled else 4 + p)
        roots += 4 * (shape.num_heads + shape.num_kv_heads)
    if form.compiled:
        return 4 * hidden * p + attention + 3 * shape.ffn_size * p + roots
    norm = (4 + 2 * p) * hidden
    return 2 * norm + attention + 4 * shape.ffn_size * p + roots


def _loss_bytes(shape: LlamaShape, tokens: int, form: Form) -> tuple[int, int]:
    """Most bytes of head and loss in the forward and in the backward pass.

    At once: the logits, then fp32 numbers for logits, log-probabilities and their gradient. In chunks
    (`training.model.loss.chunked`, by its kernel): the forward pass holds a chunk of logits beside both
    gradients and, for more than one chunk, the head's in fp32 twice, while one is added to the other; the
    backward pass has both gradients twice.
    """
    p, vocabulary, hidden = form.width, shape.vocab_size, shape.hidden_size
    if form.chunk_tokens is None:
        return tokens * vocabulary * ((p if p < 4 else 0) + 8), tokens * vocabulary * 12
    of_hidden, of_weight = tokens * hidden * p, vocabulary * hidden * p
    in_fp32 = vocabulary * hidden * 4 if tokens > form.chunk_tokens else 0
    chunk = min(form.chunk_tokens, tokens) * vocabulary * p
    adding = chunk + (2 * in_fp32 or of_weight)
    return of_hidden + max(adding, in_fp32 + of_weight), 2 * (of_hidden + of_weight)


def _sent_bytes(config: TrainConfig, n: int, num_workers: int) -> int:
    """Of gradients that are reduced after the backward pass: in stage 1, a bucket at a time."""
    if config.zero.stage != 1 or num_workers == 1:
        return 0
    width = {"bf16": 2, "fp32": 4, "auto": 2 if config.is_bf16 else 4}[config.zero.communication_dtype]
    return min(n, config.zero.bucket_elements) * width


def _matrix_elements(shape: LlamaShape) -> int:
    return sum(rows * cols * count for (rows, cols), count in shape.matrices().items())


def _whole_elements(config: TrainConfig, shape: LlamaShape) -> int:
    """Elements of parameters whose rule needs whole matrices."""
    matrices = list(_matrix_rules(config, shape))
    whole = sum(prod(size) for size, matrix in matrices if matrix.rule in (*MUON_RULES, *SCION_RULES))
    by_norm = config.optim.matrix.rule in SCION_RULES
    return whole + (shape.num_parameters - _matrix_elements(shape) if by_norm else 0)


def _matrix_rules(
    config: TrainConfig, shape: LlamaShape
) -> Iterator[tuple[tuple[int, int], MatrixOptimConfig]]:
    """(rows, columns) and rule of each hidden matrix."""
    sizes = {name: size for name, size in shape.parameters().items() if ".layers." in name and len(size) == 2}
    for name, pattern in config.optim.pattern_of(sizes).items():
        rows, cols = sizes[name]
        yield (rows, cols), config.optim.matrices[pattern]


def _exchange_width(config: TrainConfig) -> int:
    return {"bf16": 2, "fp32": 4}[config.optim.matrix.dtype]


def _matrix_buffer_bytes(config: TrainConfig, shape: LlamaShape, *, num_workers: int) -> int:
    """`optim.step.exchange.ShapeGroup`: a worker's pieces, and where matrices arrive and become whole.

    Without travel the pieces are the whole matrices. Stage 0 has all pieces on every worker.
    """
    elements, stage = _whole_elements(config, shape), config.zero.stage
    if num_workers == 1:
        copies = elements
    elif stage == 0:
        copies = 2 * elements
    else:
        copies = (3 if _cuts_matrices(config, shape, num_workers) else 1) * elements // num_workers
    return copies * _exchange_width(config)


def _cuts_matrices(config: TrainConfig, shape: LlamaShape, num_workers: int) -> bool:
    """Whether a border between shards lies inside of a matrix. Stage 3 cuts every one."""
    if config.zero.stage == 3:
        return True
    part, end = -(-_matrix_elements(shape) // num_workers), 0
    ends = set()
    for name, size in shape.parameters().items():
        if ".layers." in name and len(size) == 2:
            end += prod(size)
            ends.add(end)
    return any(rank * part not in ends for rank in range(1, num_workers))


def step_bytes(config: TrainConfig, shape: LlamaShape, *, num_workers: int) -> int:
    """What the optimizer step holds for a moment.

    AdamW's pass over the tables holds three numbers of fp32 for each of their elements, in stage 3 four. The
    iteration of matrices (`optim.polar.orthogonalize`) takes X twice and some n x n matrices. A GPU iterates
    some of one shape at a time, and only then has the buffers in which matrices travel: of that shape, or of
    all where they do travel. A CPU keeps its buffers.
    """
    shard, whole = (1 if config.zero.stage == 0 else num_workers), _whole_elements(config, shape)
    tables = shape.num_parameters - _matrix_elements(shape) if whole else shape.num_parameters
    elementwise = (16 if config.zero.stage == 3 else 12) * tables // shard
    iterated, width, gpu = 0, _exchange_width(config), config.workers.gpu
    travels = num_workers > 1 and _cuts_matrices(config, shape, num_workers)
    for (rows, cols), count in shape.matrices().items() if whole else ():
        short, owned = min(rows, cols), -(-count // num_workers)
        each = (2 * rows * cols + (5 if uses_gram(rows, cols) else 2) * short * short) * width
        taken = min(owned * each, max(GROUP_BYTES, each)) if gpu else owned * each
        own = 0 if travels or not gpu else owned * rows * cols * width
        iterated = max(iterated, taken + own)
    if gpu and travels:
        iterated += _matrix_buffer_bytes(config, shape, num_workers=num_workers)
    return max(elementwise, iterated)
