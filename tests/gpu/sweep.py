"""Block 5: forward and backward of the model alone, by micro-batch, compiled layers, form of the loss, and
checkpointing, against the plan.

On a GPU the project trains with "compiled layers, loss chunked". The others are what that is compared with.
"""

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.gpu.block import OUT_OF_MEMORY, Run
from training.model.llama import Llama, compile_layers, initialize
from training.planner.memory import LOSS_TOKENS, WORKSPACE_BYTES, Form, activation_bytes
from training.planner.seconds import micro_batch_seconds, rates_of

MICRO = {"cuda": (1, 4, 8), "cpu": (1, 2)}  # sequences
COMPILED_MICRO = {"cuda": (4, 8), "cpu": (2,)}
CHUNK_TOKENS = {"cuda": LOSS_TOKENS, "cpu": 64}  # of the chunked loss
DIFFERENCES = (1e-2, 5e-2)  # most, relative, of loss and of the gradient's norm between variants: bf16 rounds
Found = tuple[float, float]  # loss in nats, norm of the gradient
AS_THEY_ARE, COMPILED = "layers as they are", "compiled layers"
PLAIN, CHUNKED = "plain", "chunked"
CHECKPOINTED = {0: "", 1: ", checkpointed", 2: ", every second layer checkpointed"}


def measure(run: Run) -> None:
    with run.device:
        model = Llama(run.shape)
    initialize(model, seed=0)
    if run.gpu:
        model.bfloat16()
    expected: dict[int, Found | None] = {}
    for micro in MICRO[run.device.type]:
        expected[micro] = point(run, model, AS_THEY_ARE, PLAIN, micro)
    least, most = COMPILED_MICRO[run.device.type][0], COMPILED_MICRO[run.device.type][-1]
    point(run, model, AS_THEY_ARE, CHUNKED, least, expected=expected[least])
    # On a CPU torch traces but does not compile, which takes a minute.
    compile_layers(model, backend="inductor" if run.gpu else "aot_eager")
    for micro in COMPILED_MICRO[run.device.type]:
        for name in (PLAIN, CHUNKED):
            point(run, model, COMPILED, name, micro, expected=expected[micro])
    for every in (1, 2):
        point(run, model, COMPILED, CHUNKED, most, expected=expected[most], checkpointing=every)
    graphs, sizes = counters["stats"]["unique_graphs"], len(COMPILED_MICRO[run.device.type])
    at_most = 2 * sizes + 2  # two halves of a layer for each size; the loss of a chunk, or of a smaller one
    more = f"{graphs} graphs, not {at_most} at most: layers are compiled one by one"
    run.row("graphs that were compiled", problem=None if graphs <= at_most else more, graphs=graphs)


def point(
    run: Run, model: Llama, layers: str, loss: str, micro: int, *, expected: Found | None = None,
    checkpointing: int = 0,
) -> Found | None:  # fmt: skip
    """Measure one variant. None: it does not fit."""
    case = f"{layers}, loss {loss}, micro-batch {micro}{CHECKPOINTED[checkpointing]}"
    length, chunk = run.shape.max_positions, CHUNK_TOKENS[run.device.type]
    tokens = run.random(micro, length + 1).mul(1e3).long().remainder(run.shape.vocab_size)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model.lm_head.loss_tokens = chunk if loss == CHUNKED else None
    model.model.activation_checkpointing = checkpointing
    model.zero_grad(set_to_none=True)
    run.reset_peak_memory()
    losses: list[Tensor] = []

    def there_and_back() -> None:
        model.zero_grad(set_to_none=True)
        value = model(inputs, targets)
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
    form = Form(
        2,
        compiled=layers == COMPILED,
        checkpointing=checkpointing,
        chunk_tokens=chunk if loss == CHUNKED else None,
    )
    run.row(
        case, problem=f"loss and gradient's norm are not {expected}" if apart else None, loss_nats=found[0],
        gradient_norm=found[1], ms=1e3 * middle, least_ms=1e3 * least, most_ms=1e3 * most,
        tokens_per_second=rate, peak_allocated_gb=run.peak_memory_gb(), chunk_tokens=form.chunk_tokens,
        **planned(run, form, micro), tflops=tflops, **run.of_products(tflops),
    )  # fmt: skip
    return found


def planned(run: Run, form: Form, micro: int) -> dict[str, float]:
    """Milliseconds and GB of the plan for this card; empty where there is no datasheet of it."""
    if (sheet := run.sheet) is None:
        return {}
    length, weights = run.shape.max_positions, form.width * run.shape.num_parameters
    seconds = micro_batch_seconds(run.shape, micro * length, length, form, rates_of(sheet))
    activations = activation_bytes(run.shape, micro * length, form, gradients=weights)
    size = weights + max(activations) + WORKSPACE_BYTES
    return {"planned_ms": 1e3 * sum(seconds.values()), "planned_gb": size / 1e9}
