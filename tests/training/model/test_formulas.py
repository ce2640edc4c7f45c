"""The shared formulas against torch's own count, against arithmetic by hand, and for every known device."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cluster.measure import hardware
from training.model.llama import Llama, initialize
from training.model.shapes import SHAPES, LlamaShape

SMALL = LlamaShape(
    vocab_size=160, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96
)
SHAPE_CASES = [SMALL, dataclasses.replace(SMALL, tied=True), dataclasses.replace(SMALL, num_kv_heads=4)]


def counted(work):
    """Attention as plain products: torch counts nothing for its fused kernel on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def model_of(shape):
    model = Llama(shape)
    initialize(model, seed=0)
    return model


@pytest.mark.parametrize("shape", SHAPE_CASES)
@pytest.mark.parametrize("length", [8, 32])
def test_training_flops_are_those_that_torch_counts(shape, length):
    model, batch = model_of(shape), 2
    tokens = torch.randint(shape.vocab_size, (batch, length + 1))
    torchs = counted(lambda: model(tokens[:, :-1], tokens[:, 1:]).backward())
    assert shape.flops_per_token(length) * batch * length == torchs


@pytest.mark.parametrize("shape", SHAPE_CASES)
def test_prefill_flops_are_those_that_torch_counts_with_half_of_each_square(shape):
    """Of the last layer only the last token's: the other layers' attention is causal."""
    length = 24
    model = model_of(shape)
    tokens, last = torch.randint(shape.vocab_size, (1, length)), torch.tensor([length - 1])
    with torch.no_grad():
        torchs = counted(lambda: model.lm_head(model.model(tokens, kept=last)))
        whole = counted(lambda: model(tokens))
    squares = 4 * (shape.num_layers - 1) * shape.num_heads * shape.head_dim * length**2
    assert shape.prefill_flops(length) == torchs - squares // 2
    once = shape.last_token_flops + 2 * shape.vocab_size * shape.hidden_size
    last_square = 4 * shape.num_heads * shape.head_dim * (length**2 - length)
    assert whole - torchs == (length - 1) * once + last_square


def test_decode_flops_and_bytes_by_hand():
    """Llama-2-7B at context 1000: 32 layers of 4·4096² and 3·4096·11008, a head of 32000·4096."""
    shape = SHAPES["llama-2-7b"]
    matmul = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096
    assert shape.num_matmul_parameters == matmul
    assert shape.decode_flops(1000) == 2 * matmul + 4 * 32 * 4096 * 1000
    assert shape.kv_bytes_per_token(2) == 524_288  # half a megabyte, as is well known
    read = shape.decode_bytes(batch=4, context_tokens=1000, width_bytes=2)
    assert read == 2 * matmul + 4 * 1000 * 524_288
    assert SHAPES["llama-3.1-8b"].kv_bytes_per_token(2) == 131_072  # 8 of 32 heads


def test_floors_of_the_1b4_model_are_those_of_the_notes():
    """3.68 ms a step on an A40 at the vocabulary of 32,000 that the serving notes assume."""
    shape = dataclasses.replace(SHAPES["llama-1b4"], vocab_size=32_000)
    seconds, bound = hardware.roofline_seconds(
        flops=shape.decode_flops(0),
        num_bytes=shape.decode_bytes(batch=1, context_tokens=0, width_bytes=2),
        peak_flops=149.7e12,
        bytes_per_s=696e9,
    )
    assert bound == "bandwidth" and seconds == pytest.approx(3.68e-3, rel=0.01)


def test_the_slowest_of_three_resources_bounds():
    """1 TFLOP at 100 TFLOP/s is 10 ms, 5 GB at 1 TB/s are 5 ms, 0.2 GB at 10 GB/s are 20 ms."""
    given = {"flops": 1e12, "num_bytes": 5e9, "peak_flops": 100e12, "bytes_per_s": 1e12}
    assert hardware.roofline_seconds(**given) == (pytest.approx(10e-3), "compute")
    link = {"link_bytes": 0.2e9, "link_bytes_per_s": 10e9}
    assert hardware.roofline_seconds(**given, **link) == (pytest.approx(20e-3), "link")
    assert hardware.roofline_seconds(**{**given, "num_bytes": 40e9}, **link)[1] == "bandwidth"


@pytest.mark.parametrize("device", hardware.DEVICES, ids=lambda device: device.name)
def test_every_device_of_the_table_has_its_ridge_and_its_shares(device):
    peaks = {"peak_flops": device.bf16_tflops * 1e12, "bytes_per_s": device.memory_gb_per_s * 1e9}
    ridge = peaks["peak_flops"] / peaks["bytes_per_s"]
    assert 100 < ridge < 450  # FLOPs per byte: all are tensor-core GPUs
    for factor, bound in ((0.99, "bandwidth"), (1.01, "compute")):
        seconds, by = hardware.roofline_seconds(flops=ridge * factor, num_bytes=1.0, **peaks)
        assert by == bound
        rate = 1 / seconds
        mfu = hardware.mfu(
            tokens_per_second=rate, flops_per_token=ridge * factor, num_devices=1,
            peak_tflops=device.bf16_tflops,
        )  # fmt: skip
        mbu = hardware.mbu(bytes_per_step=1.0, step_seconds=seconds, gb_per_s=device.memory_gb_per_s)
        assert max(mfu, mbu) == pytest.approx(1.0)
    assert 10 < device.bf16_tflops / device.power_watts * 1e2 < 250  # 0.1 to 2.5 TFLOP/s per watt
    assert hardware.lookup(device.name) is device
    assert device in map(hardware.by_short_name, hardware.SHORT_NAMES)


def test_equal_mbu_makes_a_parity_of_1_37_per_peak_flops():
    a40, h100 = hardware.by_short_name("a40"), hardware.by_short_name("h100")
    flops, bandwidth = h100.bf16_tflops / a40.bf16_tflops, h100.memory_gb_per_s / a40.memory_gb_per_s
    assert flops / bandwidth == pytest.approx(1.37, abs=0.005)
