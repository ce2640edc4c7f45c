"""Whether an engine fits its device's memory: one message with the keys to change, instead of a traceback."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.cli import UserError
from cluster.measure.usage import out_of_memory
from optim.precision import compute_dtype
from serving.checkpoints import Served
from serving.config import ServeConfig
from training.model import shapes
from training.model.shapes import LlamaShape

Maker = TypeVar("Maker", bound=Callable[..., Any])


def says_what_does_not_fit(make: Maker) -> Maker:
    """A `make_torch_engine` that raises `UserError` if memory does not suffice.

    It raises before it allocates if weights, cache and a GPU's steps alone exceed the device's memory: on a
    CPU the allocation would succeed and the process be killed when it writes there. Otherwise it raises when
    an allocation fails.
    """

    @wraps(make)
    def made(config: ServeConfig, served: Served) -> Any:
        free, total = _memory(config)
        try:
            weights, cache, steps, dtype, what = _needed(config, served.directory)
        except (ValueError, OSError):  # no such checkpoint: `make` raises
            return make(config, served)
        of_steps = f", and steps need {steps / 1e9:,.2f} GB (engine.step_tokens)" if steps else ""
        needed = (
            f"out of memory: {what} needs {weights / 1e9:,.2f} GB of weights, and "
            f"engine.cache_tokens={config.engine.cache_tokens} needs {cache / 1e9:,.2f} GB of cache, both in "
            f"{dtype} (engine.dtype={config.engine.dtype}){of_steps}, of {free / 1e9:,.2f} GB free of "
            f"{total / 1e9:,.2f} GB; lower engine.cache_tokens, or serve a smaller model"
        )
        if weights + cache + steps > total:
            raise UserError(needed)
        try:
            return make(config, served)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if isinstance(error, MemoryError) or out_of_memory(str(error)):
                raise UserError(f"{needed} ({str(error).splitlines()[0]})") from error
            raise

    return made  # type: ignore[return-value]


def _needed(config: ServeConfig, directory: Path | None) -> tuple[int, int, int, str, str]:
    """Bytes of weights, of cache and of a GPU's steps, their dtype, and the key that names the weights.

    A lower bound: a CPU that widens bf16 matrices needs more for them. Raises `ValueError`, `OSError`.
    """
    named = config.engine.dtype
    dtype = compute_dtype(_device(config)) if named == "auto" else getattr(torch, named)
    source = config.model.shape if directory is None else directory / "config.json"
    assert source is not None
    shape = shapes.resolve(source)
    what = f"model.shape={config.model.shape}" if directory is None else f"model.path={directory}"
    cache = config.engine.cache_tokens * shape.kv_bytes_per_token(dtype.itemsize)
    steps = _step_bytes(config, shape, dtype) if _device(config).type == "cuda" else 0
    return dtype.itemsize * shape.num_parameters, cache, steps, str(dtype).removeprefix("torch."), what


def _step_bytes(config: ServeConfig, shape: LlamaShape, dtype: torch.dtype) -> int:
    """Activations of the largest step on a GPU, and of the largest CUDA graph, which keeps its own.

    Graphs of `TorchDecoder` have a few rows, which do not count.
    """
    from serving.engine.gpu.decoder import PROMPT_ROWS, unsupported  # it imports Triton

    rows = min(config.engine.step_tokens_on("cuda"), config.engine.cache_tokens)
    if config.engine.compiled and unsupported(_device(config), dtype, shape) is None:
        rows += min(rows, PROMPT_ROWS[-1])
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    widest = max(2 * shape.ffn_size, queries + 2 * keys)
    return rows * (3 * shape.hidden_size + queries + shape.ffn_size + widest) * dtype.itemsize


def _memory(config: ServeConfig) -> tuple[int, int]:
    """Bytes free and in total: of the GPU if the engine will run on one, else of the machine."""
    if _device(config).type == "cuda":
        return torch.cuda.mem_get_info()
    amounts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return tuple(int(amounts[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))  # type: ignore


def _device(config: ServeConfig) -> torch.device:
    """Where the engine will run. A GPU that is missing is an error of `find_device`."""
    return torch.device("cuda" if config.engine.device != "cpu" and torch.cuda.is_available() else "cpu")
