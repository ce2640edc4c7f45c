"""One of every rule, and what tests of rules compute by hand."""

import torch

from optim.polar import METHODS
from optim.rules import (
    adamw,
    aurora,
    ema_nesterov,
    mars,
    muon,
    muon_eq,
    muon_plus,
    new_state,
    normuon,
    paired,
    scion,
    sgd,
    signum,
    step,
    transported,
)

RULES = {
    "muon": muon(),
    "muon-plain": muon(nesterov=False, momentum=0.9),
    "muon-cautious": muon(cautious=True),
    "adamw": adamw(beta1=0.8, beta2=0.9),
    "normuon": normuon(),
    "normuon-larger": normuon(lines="larger", divisor="max", length="kept"),
    "muon_plus": muon_plus(),
    "muon_eq": muon_eq(),
    "aurora": aurora(),
    "ema_nesterov": ema_nesterov(muon()),
    "transported-normuon": transported(normuon(nesterov=False)),
    "scion": scion(),
    "scion-sign": scion(norm="sign"),
    "transported": transported(scion()),
    "mars": mars(),
    "adamw-paired": paired(adamw()),
    "sgd": sgd(),
    "signum": signum(),
}


def tensors(*shape: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    """fp32 Gaussians whose scale differs from one to the next, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10 ** (i % 3 - 1) for i in range(count)]


def ours(rule, weight, gradients, *, lr: float) -> torch.Tensor:
    """The weight after one `step` per gradient."""
    weight = weight.clone()
    state = new_state(rule, weight, num_lines=rule.num_lines(*weight.shape) if weight.dim() == 2 else 0)
    for number, gradient in enumerate(gradients, 1):
        step(rule, weight, gradient, state, lr=lr, step=number)
    return weight


# --- the family ---------------------------------------------------------------------------------------------


def exact(rows: int, cols: int, count: int) -> list[torch.Tensor]:
    """fp64 Gaussians, for oracles that write the formula out."""
    return [tensor.double() for tensor in tensors(rows, cols, count=count)]


def factor(update: torch.Tensor, method: str = "polar_express", num_steps: int = 5) -> torch.Tensor:
    """Newton-Schulz in fp64 on U, s, V: the method's polynomials on the singular values alone."""
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for a, b, c in METHODS[method].steps(num_steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh
