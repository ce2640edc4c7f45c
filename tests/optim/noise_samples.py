"""Noise of every kind, and draws of it, for tests."""

import torch

from optim.noise import Noise

NOISES = {
    "gaussian": Noise("gaussian", scale=0.5),
    "student": Noise("student", tail=1.5, moment=1.2, scale=2.0),
    "stable": Noise("stable", tail=1.5, moment=1.2, scale=2.0),
}


def draws(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fp64 [count] of uniforms on (0, 1), from torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.rand(2, count, generator=generator, dtype=torch.float64).clamp_min(2.0**-54)
    return u, v


def sample(noise: Noise, count: int, *, name: str = "w", seed: int = 0, step: int = 1) -> torch.Tensor:
    return noise.sample(name, start=0, stop=count, seed=seed, step=step)
