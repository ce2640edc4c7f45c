"""Compiled symmetric products against fp64, and what happens without a compiler or the instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optim import native, polar

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REASON = native.unsupported(CPU, torch.bfloat16)
compiled = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZES = [(1, 1), (5, 3), (31, 33), (32, 32), (33, 64), (40, 7), (64, 100), (96, 257), (100, 1)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, sizes: torch.Tensor) -> None:
    """bf16 rounds by 2^-9 of the value at the most; fp32 sums of `sizes` add 1e-6 of these."""
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * sizes).all()


@compiled
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_gram_matrix_of_any_size_and_layout(n, k, tall):
    x = random(3, k, n).mT if tall else random(3, n, k)
    exact = x.double() @ x.double().mT
    found = native.symmetric_product(x, x)
    assert torch.equal(found, found.mT)  # mirrored exactly
    assert_rounded_once(found, exact, x.double().abs() @ x.double().abs().mT)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [7, 32, 65, 96])
def test_products_of_polynomials_with_an_addend(n, threads):
    x = random(4, n, n + 9)
    gram = native.symmetric_product(x, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.symmetric_product(gram, gram.clone(), alpha=0.3, c=gram, beta=-1.7)
    finally:
        torch.set_num_threads(before)
    wide = gram.double()
    assert_rounded_once(found, 0.3 * wide @ wide - 1.7 * wide, wide.abs() @ wide.abs() + wide.abs())
    assert torch.equal(found, found.mT)


@compiled
def test_strided_batches_are_read_where_they_lie():
    whole = random(6, 40, 80)
    part = whole[::2, 3:36, 1::2]
    expected = native.symmetric_product(part.contiguous(), part.contiguous())
    assert torch.equal(native.symmetric_product(part, part), expected)


@compiled
def test_the_upper_half_of_the_addend_is_not_read():
    x = random(1, 70, 20)
    c = native.symmetric_product(x, x)
    broken = c.clone()
    broken[0].masked_fill_(torch.ones(70, 70).triu(1).bool(), torch.nan)
    options = {"alpha": 2.0, "beta": 0.5}
    found = native.symmetric_product(x, x, c=broken, **options)
    assert torch.equal(found, native.symmetric_product(x, x, c=c, **options))


@compiled
def test_not_a_number_goes_through():
    x = random(1, 40, 20)
    x[0, 3, 4] = torch.nan
    found = native.symmetric_product(x, x)
    assert found[0, 3].isnan().all() and found[0, :, 3].isnan().all()
    assert found.isnan().sum() == 2 * 40 - 1


@compiled
def test_operands_that_do_not_fit_are_an_error():
    x = random(2, 4, 5)
    square = random(2, 4, 4)
    for wrong in (
        lambda: native.symmetric_product(x, random(2, 4, 6)),
        lambda: native.symmetric_product(x, x, c=random(2, 4, 5)),
        lambda: native.symmetric_product(x, x, c=square.mT),
        lambda: native.symmetric_product(x.float(), x),
    ):
        with pytest.raises(ValueError, match=r"no symmetric product|must be bf16"):
            wrong()


def without(**environment: str) -> str:
    """In a process of its own: why there is no library, and the sum of an orthogonalised matrix."""
    program = (
        "import torch; from optim import native, polar\n"
        "x = torch.randn(2, 40, 90, generator=torch.Generator().manual_seed(0))\n"
        "y = polar.orthogonalize(x, method='jordan', dtype=torch.bfloat16)\n"
        "print(native.unsupported(torch.device('cpu'), torch.bfloat16)); print(y.float().norm().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_what_is_missing_is_said_and_torch_does_the_work(tmp_path):
    """No compiler, one that fails, a folder that cannot be made, and the switch."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    file = tmp_path / "file"
    file.write_text("")
    usual = float(without().splitlines()[1])
    supported = torch.cpu._is_avx512_bf16_supported()
    for environment, reason in (
        ({"ASUNCION_NATIVE": "0"}, "ASUNCION_NATIVE=0 turned it off"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler is not on the path"),
        ({"CXX": str(broken)}, "failed: x.cpp:1: error: no such flag"),
        ({"XDG_CACHE_HOME": str(file)}, "native.cpp cannot be compiled or loaded"),
    ):
        said, norm = without(**environment).splitlines()
        assert reason in said or not supported
        assert float(norm) == pytest.approx(usual, rel=0.02)


def test_other_devices_and_dtypes_stay_with_torch():
    assert native.unsupported(torch.device("meta"), torch.bfloat16) == "meta is no CPU"
    assert native.unsupported(CPU, torch.float32) == "products of torch.float32 stay with torch"


@compiled
@pytest.mark.parametrize("shape", [(33, 33), (33, 90), (90, 33)])
def test_orthogonalize_uses_it(shape, monkeypatch):
    calls = []
    product = native.symmetric_product
    monkeypatch.setattr(native, "symmetric_product", lambda *a, **k: calls.append(1) or product(*a, **k))
    polar.orthogonalize(random(2, *shape), method="jordan", dtype=torch.bfloat16)
    assert len(calls) == 10  # of the standard form XXᵀ and A² five times; of the Gram form 2, 5, and 3 PAP
