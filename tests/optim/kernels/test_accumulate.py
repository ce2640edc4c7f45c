"""The sum of gradients: compiled for each GPU without one, and interpreted against torch."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from optim.kernels import accumulate
from tests.compiled_kernels import compiled, problems

each_mode = pytest.mark.parametrize("overwrite", [False, True])


@each_mode
@pytest.mark.parametrize("capability", accumulate.CAPABILITIES)
def test_the_kernel_loads_and_stores_16_bytes_at_a_time(capability, overwrite, tmp_path):
    gradient = torch.empty(3 * accumulate.BLOCK + 16, dtype=torch.bfloat16)
    call = accumulate.call(gradient.float(), gradient, overwrite=overwrite)
    kernel = compiled(call, capability)
    assert problems(kernel, capability, tmp_path) == []
    ptx = kernel.asm["ptx"]
    assert "st.global.v4" in ptx and ptx.count("ld.global.v4") >= (1 if overwrite else 3)


@each_mode
@pytest.mark.parametrize("count", [1, accumulate.BLOCK, 2 * accumulate.BLOCK + 5])
def test_the_kernel_adds_as_torch_does_to_the_bit(count, overwrite):
    draw = torch.Generator().manual_seed(count)
    gradient = torch.randn(count, generator=draw).bfloat16()
    total = torch.randn(count, generator=draw)
    expected = gradient.float() if overwrite else total + gradient
    call = accumulate.call(total, gradient, overwrite=overwrite)
    InterpretedFunction(call.kernel.fn)[call.grid](**call.arguments)
    assert torch.equal(total, expected)


@each_mode
def test_where_the_kernel_does_not_run_torch_adds(overwrite):
    assert accumulate.unsupported(torch.device("cpu")) == "cpu is no CUDA device"
    total, gradient = torch.ones(3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    accumulate.add(total, gradient, overwrite=overwrite)
    assert total.tolist() == ([1, 2, 3] if overwrite else [2, 3, 4])


def test_what_does_not_lie_alike_is_refused():
    with pytest.raises(ValueError, match="a gradient of 3 elements does not lie as a sum of 4"):
        accumulate.call(torch.ones(4), torch.ones(3), overwrite=False)
