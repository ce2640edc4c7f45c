"""serving/engine/native.cpp, called: a decoder step on a CPU with AVX2 or better (see `machine.compiled`)."""

import contextlib
import ctypes
import functools
import math
import mmap
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.machine import compiled
from serving.engine.decoder import SLICE_ROWS
from serving.engine.scheduler import BLOCK_TOKENS, Span, table
from training.model.llama import Llama, rotary

SOURCE = Path(__file__).with_suffix(".cpp")
CHUNK_BYTES = 64 << 20  # of memory that is asked for at once
LINE_BYTES = 64  # of the CPU's caches

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


def _struct(name: str, **fields: Any) -> Any:
    """A ctypes structure; `fields` maps a type's name to the fields of that type, in order."""
    kinds = {"long": _LONG, "int": _INT, "float": ctypes.c_float, "pointer": _POINTER}
    declared = [(field, kinds[kind.rstrip("_")]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": declared})


# As in native.cpp.
_Layer: Any = _struct(
    "Layer", pointer="attention_norm mlp_norm q_norm k_norm qkv out gate_up down keys values"
)
_Model: Any = _struct(
    "Model",
    long="num_layers hidden heads kv_heads head_dim ffn vocab",
    float="eps",
    pointer="embedding norm head cosines sines layers",
)
_Span: Any = _struct("Span", int="first_row num_rows first_position first_block")
_Step: Any = _struct(
    "Step",
    long="num_rows num_kept num_spans num_outputs threads",
    pointer="tokens outputs blocks spans kept x normed qkv mixed inner logits",
)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `NativeDecoder` cannot run on `device`, or None. The first call compiles."""
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if dtype != torch.bfloat16:
        return f"{dtype} stays with torch"
    return _library()[1]


def tier() -> str | None:
    """Which vectors it computes with, such as "AVX2"; None if it cannot run on this CPU."""
    return compiled.choose_tier()[0]


def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    # OpenMP: the library that torch has loaded, so the threads are shared.
    library, reason = compiled.load(SOURCE, flags=("-fopenmp",))
    return library and _declared(library), reason


@functools.cache
def _declared(library: Any) -> Any:
    """The library, with the types of its functions."""
    for function in (library.decoder_step, library.decoder_logits):
        function.argtypes, function.restype = (_POINTER, _POINTER), None
    library.pack_panels.argtypes, library.pack_panels.restype = (_POINTER, _LONG, _LONG, _POINTER), None
    for function in (library.panel_rows, library.activation_bytes):
        function.argtypes, function.restype = (), _LONG
    return library


class _HugePages:
    """Memory in pages of 2 MiB where Linux gives them, 0 at first: the CPU looks up fewer addresses."""

    def __init__(self) -> None:
        self._free = memoryview(b"")

    def zeros(self, *size: int, dtype: torch.dtype) -> Tensor:
        """Raises `MemoryError`."""
        count = math.prod(size)
        num_bytes = -(-count * dtype.itemsize // LINE_BYTES) * LINE_BYTES
        if num_bytes > len(self._free):
            try:
                # Private: the kernel gives huge pages of shared memory, Python's default, only where it is
                # set up for that (shmem_enabled).
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                chunk = mmap.mmap(-1, max(CHUNK_BYTES, num_bytes), flags=flags)
            except OSError as error:
                raise MemoryError(f"{num_bytes:,} bytes: {error.strerror}") from error
            with contextlib.suppress(OSError, AttributeError):  # a kernel, or a system, that has none
                chunk.madvise(mmap.MADV_HUGEPAGE)
            self._free = memoryview(chunk)
        part, self._free = self._free[:num_bytes], self._free[num_bytes:]
        return torch.frombuffer(part, dtype=dtype, count=count).view(size)


def _pack(weight: Tensor, library: Any, memory: _HugePages) -> Tensor:
    """A bf16 weight [rows, columns] as panels [⌈rows/P⌉, columns/2, P] of pairs (int32); P = panel_rows()."""
    (rows, columns), panel = weight.shape, library.panel_rows()
    panels = memory.zeros(-(-rows // panel), columns // 2, panel, dtype=torch.int32)
    library.pack_panels(weight.contiguous().data_ptr(), rows, columns, panels.data_ptr())
    return panels


def _alternate(gate: Tensor, up: Tensor, half: int) -> Tensor:
    """`half` rows of gate, the same of up, and so on; zeros fill the last of both."""
    padded = (torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % half)) for weight in (gate, up))
    return torch.stack([weight.unflatten(0, (-1, half)) for weight in padded], dim=1).flatten(0, 2)


class NativeDecoder:
    """The compiled decoder. It owns the packed weights and the cache; packing empties `model`.

    A request's logits do not depend, to the bit, on other requests or on where its prompt is cut into chunks.

    Args:
        model: bf16, on the CPU.
        num_blocks: of the cache, of `BLOCK_TOKENS` tokens each.
        slots: most requests that run at once, and so most rows of logits.
        step_tokens: most rows of a step.
        context_tokens: most positions.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_blocks: int,
        slots: int,
        step_tokens: int,
        context_tokens: int,
        num_threads: int,
    ) -> None:
        library, reason = _library()
        if library is None:
            raise ValueError(reason)
        shape = model.shape
        if shape.head_dim % 16:
            raise ValueError(f"head_dim {shape.head_dim} is no multiple of 16")
        if shape.qkv_bias or shape.out_bias or shape.mlp_bias:
            raise ValueError("the model has biases")
        if shape.hidden_size % 2 or shape.ffn_size % 2:
            raise ValueError("hidden_size and ffn_size must be even")
        self._library, self._num_threads, self._memory = library, num_threads, _HugePages()
        self._kept: list[Tensor] = []  # what the structs point to
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        cache = (shape.num_layers, num_blocks, shape.num_kv_heads, BLOCK_TOKENS * shape.head_dim // 2)
        self._keys, self._values = (self._memory.zeros(*cache, dtype=torch.int32) for _ in range(2))
        by = rotary(shape, torch.arange(context_tokens))
        cosines, sines = (table[0, 0, :, : shape.head_dim // 2].contiguous() for table in by)
        weights: dict[str, Tensor] = dict(model.named_parameters())
        if not shape.tied:
            model.lm_head.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self._layers = (_Layer * shape.num_layers)(
            *(self._layer(weights, index, model) for index in range(shape.num_layers))
        )
        head = weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
        self._model = _Model(
            *(shape.num_layers, shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim),
            *(shape.ffn_size, shape.vocab_size, shape.norm_eps),
            *(self._keep(weights[f"model.{name}.weight"].detach()) for name in ("embed_tokens", "norm")),
            self._keep(_pack(head.detach(), library, self._memory)),
            *(self._keep(cosines), self._keep(sines), ctypes.addressof(self._layers)),
        )
        self._logits = torch.empty(slots, shape.vocab_size)
        self._scored: list[int] = []  # rows of the last step
        activation = torch.bfloat16 if library.activation_bytes() == 2 else torch.float32
        widths = {
            "x": shape.hidden_size,
            "normed": shape.hidden_size,
            "qkv": queries + 2 * keys,
            "mixed": queries,
            "inner": shape.ffn_size,
        }
        self._rows = {
            name: self._memory.zeros(step_tokens, width, dtype=activation) for name, width in widths.items()
        }

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """See `StepDecoder`. The logits are overwritten by the next step."""
        counts = [span.stop - span.start for span in spans]
        kept = [span.num_kept for span in spans]
        firsts, kept_firsts = ([0, *accumulate(numbers)] for numbers in (counts, kept))
        num_rows, num_kept = firsts[-1], kept_firsts[-1]
        texts = (span.request.tokens[span.start : span.stop] for span in spans)
        tokens = (_INT * num_rows)(*(token for text in texts for token in text))
        rows = [after - 1 for after, span in zip(kept_firsts[1:], spans, strict=True) if span.samples]
        outputs = (_INT * max(1, len(rows)))(*rows)
        self._scored = [
            first + row
            for first, span in zip(kept_firsts[:-1], spans, strict=True)
            for row in range(span.num_scored)
        ]
        block_ids, first_blocks = table(spans)
        blocks = (_INT * len(block_ids))(*block_ids)

        def describe(firsts: Sequence[int], counts: Sequence[int]) -> Any:
            starts = (span.stop - count for span, count in zip(spans, counts, strict=True))
            return (_Span * len(spans))(*zip(firsts[:-1], counts, starts, first_blocks, strict=True))

        described, described_kept = describe(firsts, counts), describe(kept_firsts, kept)
        step = _Step(
            *(num_rows, num_kept, len(spans), len(rows), self._num_threads),
            *map(ctypes.addressof, (tokens, outputs, blocks, described, described_kept)),
            *(buffer.data_ptr() for buffer in self._rows.values()),
            self._logits.data_ptr(),
        )
        self._library.decoder_step(ctypes.addressof(self._model), ctypes.addressof(step))
        return self._logits[: len(rows)]

    def scored(self) -> Iterator[Tensor]:
        """See `StepDecoder`."""
        logits = torch.empty(min(SLICE_ROWS, len(self._scored)), self._model.vocab)
        for start in range(0, len(self._scored), SLICE_ROWS):
            rows = self._scored[start : start + SLICE_ROWS]
            outputs = (_INT * len(rows))(*rows)
            step = _Step(
                num_outputs=len(rows),
                threads=self._num_threads,
                outputs=ctypes.addressof(outputs),
                x=self._rows["x"].data_ptr(),
                normed=self._rows["normed"].data_ptr(),
                logits=logits.data_ptr(),
            )
            self._library.decoder_logits(ctypes.addressof(self._model), ctypes.addressof(step))
            yield logits[: len(rows)]

    def _layer(self, weights: dict[str, Tensor], index: int, model: Llama) -> Any:
        def take(name: str) -> Tensor:
            return weights[f"model.layers.{index}.{name}.weight"].detach()

        qkv = torch.cat([take(f"self_attn.{name}_proj") for name in "qkv"])
        half = self._library.panel_rows() // 2
        gate_up = _alternate(take("mlp.gate_proj"), take("mlp.up_proj"), half)
        weights_in_order = (qkv, take("self_attn.o_proj"), gate_up, take("mlp.down_proj"))
        packed = [_pack(weight, self._library, self._memory) for weight in weights_in_order]
        norms: list[int | None] = [
            self._keep(take(name)) for name in ("input_layernorm", "post_attention_layernorm")
        ]
        heads = ("self_attn.q_norm", "self_attn.k_norm")
        norms += [self._keep(take(name)) for name in heads] if model.shape.qk_norm else [None, None]
        panels = [self._keep(panel) for panel in packed]
        model.model.layers[index] = torch.nn.Identity()  # frees the unpacked weights
        for name in [name for name in weights if name.startswith(f"model.layers.{index}.")]:
            del weights[name]
        return _Layer(*norms, *panels, self._keys[index].data_ptr(), self._values[index].data_ptr())

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
