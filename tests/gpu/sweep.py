"""Block 5: forward and backward of the model alone, by micro-batch, compiled layers and form of the loss.

On a GPU the project trains with "compiled layers, loss chunked". The others are what that is compared with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from tests.gpu.block import OUT_OF_MEMORY, Run
from training.model.llama import Llama, compile_layers, initialize
from training.model.loss import IGNORED_TARGET
from training.planner.memory import LOSS_TOKENS

MICRO = {"cuda": (1, 2, 4, 8, 12), "cpu": (1, 2)}  # sequences
COMPILED_MICRO = {"cuda": (4, 8), "cpu": (2,)}
CHUNK_TOKENS = {"cuda": LOSS_TOKENS, "cpu": 64}  # of the chunked loss
DIFFERENCES = (1e-2, 5e-2)  # most, relative, of loss and of the gradient's norm between variants: bf16 rounds
Found = tuple[float, float]  # loss in nats, norm of the gradient
AS_THEY_ARE, COMPILED = "layers as they are", "compiled layers"


def measure(run: Run) -> None:
    with run.device:
        model = Llama(run.shape)
    initialize(model, seed=0)
    if run.gpu:
        model.bfloat16()
    expected: dict[int, Found | None] = {}
    for micro in MICRO[run.device.type]:
        expected[micro] = point(run, model, AS_THEY_ARE, "plain", micro)
    middle = COMPILED_MICRO[run.device.type][0]
    for name in LOSSES:
        if name != "plain":
            point(run, model, AS_THEY_ARE, name, middle, expected=expected[middle])
    # On a CPU torch traces but does not compile, which takes a minute.
    compile_layers(model, backend="inductor" if run.gpu else "aot_eager")
    for micro in COMPILED_MICRO[run.device.type]:
        for name in ("plain", "chunked"):
            point(run, model, COMPILED, name, micro, expected=expected[micro])
    graphs, sizes = counters["stats"]["unique_graphs"], len(COMPILED_MICRO[run.device.type])
    most = (
        2 * sizes + 2
    )  # two halves of a layer for each size, and the loss of a chunk, or of a last, smaller one
    more = f"{graphs} graphs, not {most} at most: layers are compiled one by one"
    run.row("graphs that were compiled", problem=None if graphs <= most else more, graphs=graphs)


def point(
    run: Run, model: Llama, layers: str, loss: str, micro: int, *, expected: Found | None = None
) -> Found | None:
    """Measure one variant. None: it does not fit, or this torch does not have it; the row says which."""
    case = f"{layers}, loss {loss}, micro-batch {micro}"
    if loss not in LOSSES_HERE:
        run.row(case, result=f"torch {torch.__version__} has none")
        return None
    length = run.shape.max_positions
    tokens = run.random(micro, length + 1).mul(1e3).long().remainder(run.shape.vocab_size)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model.zero_grad(set_to_none=True)
    run.reset_peak_memory()
    losses: list[Tensor] = []

    def there_and_back() -> None:
        model.zero_grad(set_to_none=True)
        value = LOSSES[loss](model, inputs, targets, CHUNK_TOKENS[run.device.type])
        value.backward()
        losses.append(value.detach())

    try:
        middle, least, most = run.seconds_of(there_and_back, repeats=4, warm_up=2)
    except torch.OutOfMemoryError:
        run.row(case, result=OUT_OF_MEMORY, peak_allocated_gb=run.peak_memory_gb())
        return None
    rate = micro * length / middle
    tflops = rate * run.shape.flops_per_token(length) / 1e12
    gradients = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
    found = losses[-1].item(), gradients.norm().item()
    limits = zip(found, expected or found, DIFFERENCES, strict=True)
    apart = any(not abs(value / other - 1) <= limit for value, other, limit in limits)
    run.row(
        case, problem=f"loss and gradient's norm are not {expected}" if apart else None, loss_nats=found[0],
        gradient_norm=found[1], ms=1e3 * middle, least_ms=1e3 * least, most_ms=1e3 * most,
        tokens_per_second=rate, peak_allocated_gb=run.peak_memory_gb(), tflops=tflops,
        **run.of_products(tflops),
    )  # fmt: skip
    return found


# --- forms of the loss --------------------------------------------------------------------------------------


def plain(model: Llama, inputs: Tensor, targets: Tensor, chunk: int) -> Tensor:
    model.lm_head.loss_tokens = None
    return model(inputs, targets)


def chunked(model: Llama, inputs: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """`training.model.loss.chunked`."""
    model.lm_head.loss_tokens = chunk
    return model(inputs, targets)


def fused(model: Llama, inputs: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """torch's own, from 2.12 on."""
    hidden = model.model(inputs).flatten(0, 1)
    return F.linear_cross_entropy(
        hidden, model.lm_head.weight, targets.flatten(), ignore_index=IGNORED_TARGET
    )


LOSSES = {"plain": plain, "chunked": chunked, "linear_cross_entropy": fused}
LOSSES_HERE = set(LOSSES) - ({"linear_cross_entropy"} if not hasattr(F, "linear_cross_entropy") else set())
