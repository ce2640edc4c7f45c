"""Gradient noise: its tail index and norms measured, and heavy-tailed noise of known index to inject.

Measured: `hill` reads the tail index of a sample and its error, `measure` the noise of one matrix's gradients
in a norm and its dual (`optim.geometry`). Injected: `Noise`, whose p-th absolute moment is set, because the
theory of heavy-tailed noise assumes E|ξ|^p <= σ^p for one p in (1, 2] and nothing above it.

The noise on element i of a parameter at a step is a function of (seed, name, step, i) alone. Hence every ZeRO
stage, world size and resumed run injects the same, whatever cut a rank asks for. Runs that differ in kind,
tail or scale only draw from the same uniforms, so that pairs can be compared.

The draws are a counter-based generator, Philox4x32-10, in the tensor's own integers: random access to any
element, no state to save, exact on every device and under every torch. What follows is fp64 elementary
functions, rounded to fp32 at the end: the same machine gives the same bits under any cut. Another torch,
processor or device may differ where its log or cos differs in its last bit, which moves the fp32 result by
one unit for about one element in 10^8. A torch.Generator per block would be a third faster on the CPU, but
torch keeps its stream neither over versions nor over devices, and a cut would pay for whole blocks.

Sources: Hill 1975, https://doi.org/10.1214/aos/1176343247; Philox, Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405, and https://github.com/DEShawResearch/random123; Student-t, Bailey
1994, https://doi.org/10.2307/2153537; stable, Chambers, Mallows and Stuck 1976,
https://doi.org/10.1080/01621459.1976.10480344. The moments are derived where they stand, and
tests/optim/test_noise.py integrates them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, isqrt, lgamma, log, nan, pi, sqrt

import torch
from torch import Tensor

from optim.geometry import Norm, wide

MIN_TAIL = 10  # order statistics below which the default gives no index: its error would be a third

WORD = 2**32 - 1
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
ALIGNMENT = 128  # elements: a cut computes whole vectors, since the last few might take other code
CHUNK_ELEMENTS = 1 << 15  # of a pass on the CPU, whose integers then fit its cache
GPU_CHUNK_ELEMENTS = 1 << 22  # of a pass elsewhere, whose integers take 32 B each and more


@dataclass(frozen=True)
class TailIndex:
    """Attributes:
    index: α of P(|x| > t) ~ t^-α. Infinite if the largest values are all equal; NaN if unknown.
    standard_error: asymptotic, index / √num_tail: 95% of intervals ± 1.96 of it hold α, bias aside.
    num_tail: order statistics used, k.
    """

    index: float
    standard_error: float
    num_tail: int


def hill(values: Tensor, *, num_tail: int | None = None) -> TailIndex:
    """Hill's estimator on absolute values: 1 / index is the mean log-excess of the k largest over the next.

    Exact zeros are left out. The default k = √n (of n nonzero values) trades variance for bias: the best k
    grows as n^(2ρ/(2ρ+1)) (Hall 1982), with ρ = 2/ν for Student-t, 1 for stable laws, so √n stays below it,
    and the bias below the error, for every t with ν < 4 and every stable law with index < 2, for n large
    enough. How large depends on the law. Mean index and share of 95% intervals that hold the true one, of
    4000, 1000 and 200 samples:

        n             t 1.5       t 2         t 3         stable 1.2  stable 1.5  stable 1.8  stable 1.9
        10^4 (k=100)  1.52  94%   2.01  95%   2.91  93%   1.22  95%   1.55  95%   2.03  83%   2.65  21%
        10^5 (k=316)  1.50  95%   2.00  95%   2.95  93%   1.20  95%   1.51  97%   1.87  90%   2.08  68%
        10^6 (k=1000) 1.50  96%   2.00  97%   2.97  94%   1.20  97%   1.51  95%   1.82  94%   1.95  89%

    A stable law near 2 thus reads too high, even above 2 (Weron 2001, https://arxiv.org/abs/cond-mat/0103256).
    A Gaussian sample reads 9, 11 and 13: no power law, an index that grows with depth. The entries of one
    gradient are neither independent nor of one scale: dependence makes the true error larger than the one
    stated, and a mixture of scales can read heavier than the noise of any one entry.

    Args:
        values: any shape and floating dtype; the logarithms are fp64.
        num_tail: k, in place of the default.

    Returns:
        NaN with k nonzero values or fewer, by default also with k < `MIN_TAIL` (n < 100); NaN if a value
        is infinite or NaN.

    Raises:
        ValueError: num_tail below 1.
    """
    if num_tail is not None and num_tail < 1:
        raise ValueError(f"num_tail is {num_tail}, but the estimator needs at least 1")
    num_values = int(values.count_nonzero())
    k = isqrt(num_values) if num_tail is None else num_tail
    if k >= num_values or (num_tail is None and k < MIN_TAIL):
        return TailIndex(nan, nan, k)
    largest = values.detach().abs().flatten().topk(k + 1, sorted=False).values.double()
    if not largest.isfinite().all():
        return TailIndex(nan, nan, k)
    index = (k / (largest.log() - largest.min().log()).sum()).item()  # the least adds zero
    return TailIndex(index, index / sqrt(k), k)


def gaussian(u: Tensor, v: Tensor, *, tail: float = inf) -> Tensor:
    """Standard normal variates of uniforms on (0, 1), by Box and Muller. `tail` is infinite."""
    return u.log().mul_(-2).sqrt_().mul_((v * (2 * pi)).cos_())


def student(u: Tensor, v: Tensor, *, tail: float) -> Tensor:
    """Student-t variates with ν = tail > 0 of uniforms on (0, 1): √(ν(u^(-2/ν) - 1)) cos 2πv (Bailey)."""
    return u.log().mul_(-2 / tail).expm1_().mul_(tail).sqrt_().mul_((v * (2 * pi)).cos_())


def stable(u: Tensor, v: Tensor, *, tail: float) -> Tensor:
    """Symmetric stable variates with α = tail in (0, 2] of uniforms on (0, 1): E exp(itX) = exp(-|t|^α).

    Chambers, Mallows and Stuck, with the angle a = π(u - 1/2) and the exponential w = -log v:
    sin(αa) / cos(a)^(1/α) · (cos((1-α)a) / w)^((1-α)/α). Cauchy at α = 1, normal of variance 2 at α = 2.
    """
    angle = (u - 0.5).mul_(pi)
    log_ratio = (angle * (1 - tail)).cos_().div_(v.log().neg_()).log_().mul_(1 - tail)
    size = log_ratio.sub_((u * pi).sin_().log_()).div_(tail).exp_()  # cos a, exact where u is small
    return angle.mul_(tail).sin_().mul_(size)


def gaussian_moment(p: float, *, tail: float = inf) -> float:
    """E|x|^p of `gaussian`: 2^(p/2) Γ((1+p)/2) / √π."""
    return exp(p / 2 * log(2) + lgamma((1 + p) / 2)) / sqrt(pi)


def student_moment(p: float, *, tail: float) -> float:
    """E|x|^p of `student`, p < ν: ν^(p/2) Γ((1+p)/2) Γ((ν-p)/2) / (√π Γ(ν/2)).

    x = z/√(c/ν) with z normal and c χ² of ν degrees, independent: E|z|^p times E(c/ν)^(-p/2).
    """
    logarithm = p / 2 * log(tail) + lgamma((1 + p) / 2) + lgamma((tail - p) / 2) - lgamma(tail / 2)
    return exp(logarithm) / sqrt(pi)


def stable_moment(p: float, *, tail: float) -> float:
    """E|x|^p of `stable`, p < α (so p < 2): 2^p Γ((1+p)/2) Γ(1 - p/α) / (√π Γ(1 - p/2)).

    x = √(2s)·z with z normal and s positive stable, E exp(-λs) = exp(-λ^(α/2)): 2^(p/2) E|z|^p times
    E s^(p/2) = Γ(1 - p/α) / Γ(1 - p/2).
    """
    logarithm = p * log(2) + lgamma((1 + p) / 2) + lgamma(1 - p / tail) - lgamma(1 - p / 2)
    return exp(logarithm) / sqrt(pi)


@dataclass(frozen=True)
class Law:
    """Attributes:
    variates: (u, v, tail) -> standard variates of uniforms; small u make the tail. Overwrites neither.
    moment: (p, tail) -> E|x|^p of these.
    allows: which tails it has; `tails` says so in words.
    """

    variates: Callable[..., Tensor]
    moment: Callable[..., float]
    allows: Callable[[float], bool]
    tails: str


KINDS = {
    "gaussian": Law(gaussian, gaussian_moment, lambda tail: tail == inf, "inf: it has no power-law tail"),
    "student": Law(student, student_moment, lambda tail: 0 < tail < inf, "finite, the degrees of freedom"),
    "stable": Law(stable, stable_moment, lambda tail: 0 < tail <= 2, "in (0, 2]"),
}


@dataclass(frozen=True)
class Noise:
    """Independent symmetric noise on every element, with E|ξ|^moment = scale^moment.

    Attributes:
        kind: a name in `KINDS`.
        tail: P(|ξ| > t) ~ t^-tail: degrees of freedom of "student", α of "stable"; inf for "gaussian".
        moment: p in (1, 2], below `tail`. At 2, `scale` is the standard deviation.
        scale: σ, in units of the gradient's entries, >= 0.

    Raises:
        ValueError: a value out of these bounds; the message names it.
    """

    kind: str
    tail: float = inf
    moment: float = 2.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"noise.kind: {self.kind!r}; known are {', '.join(KINDS)}")
        law = KINDS[self.kind]
        if not law.allows(self.tail):
            raise ValueError(f"noise.tail: {self.tail}, but that of {self.kind} is {law.tails}")
        if not 1 < self.moment <= 2:
            raise ValueError(f"noise.moment: {self.moment}, but it lies in (1, 2]")
        if not self.moment < self.tail:
            raise ValueError(
                f"noise.moment: {self.moment}, but only moments below the tail index, {self.tail}, are finite"
            )
        if not (self.scale >= 0 and isfinite(self.scale)):
            raise ValueError(f"noise.scale: {self.scale}, but it is finite and not negative")

    @property
    def unit(self) -> float:
        """What the standard variates of `KINDS` are multiplied by."""
        return self.scale / KINDS[self.kind].moment(self.moment, tail=self.tail) ** (1 / self.moment)

    def sample(
        self, name: str, *, start: int, stop: int, seed: int, step: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The noise on elements [start, stop) of parameter `name` at optimizer step `step`: any cut of it.

        Each element takes 64 random bits, 40 of them for the tail: nothing rarer than one in 10^12 occurs.
        This leaves out a share of about 2^(-41(1 - p/tail)) of the p-th moment: 0.3% at p = 1.2, tail = 1.5.
        Most samples of n elements lack about n^-(1 - p/tail) of it anyway.

        Returns:
            fp32 [stop - start] on `device`.
        """
        assert 0 <= start <= stop and step >= 0, (start, stop, step)
        device = torch.device(device)
        law, unit = KINDS[self.kind], self.unit
        result = torch.empty(stop - start, dtype=torch.float32, device=device)
        for begin, end in _chunks(start, stop, device):
            u, v = uniforms(begin, end, key=_key(seed, name), step=step, device=device)
            values = law.variates(u, v, tail=self.tail).mul_(unit)
            low, high = max(begin, start), min(end, stop)
            result[low - start : high - start] = values[low - begin : high - begin]
        return result


def _chunks(start: int, stop: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Aligned pieces that cover [start, stop)."""
    size = CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    for begin in range(start - start % ALIGNMENT, stop, size):
        yield begin, min(begin + size, stop + -stop % ALIGNMENT)


def _key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit words of a hash: streams of different seeds or parameters have nothing in common."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniforms(
    begin: int, end: int, *, key: tuple[int, int], step: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two uniforms on (0, 1) for each element of [begin, end), fp64: on grids of 2^-40 and of 2^-24.

    Elements 2j and 2j + 1 share the Philox block with counter (j low, j high, step low, step high): words 0
    and 1, words 2 and 3. Both borders are even.
    """
    assert begin % 2 == 0 and end % 2 == 0, (begin, end)
    block = torch.arange(begin // 2, end // 2, device=device)
    words = philox(
        (block & WORD, block >> 32, torch.full_like(block, step & WORD), torch.full_like(block, step >> 32)),
        key=key,
    )
    high = torch.stack((words[0], words[2]), dim=-1).view(-1)
    low = torch.stack((words[1], words[3]), dim=-1).view(-1)
    fine = high.bitwise_left_shift_(8).bitwise_or_(low >> 24)
    coarse = low.bitwise_and_(2**24 - 1)
    return fine.double().add_(0.5).mul_(2.0**-40), coarse.double().add_(0.5).mul_(2.0**-24)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], *, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of each counter under a key. Words are 32-bit, counters' in int64 [n].

    Products of two words fill all 64 bits and wrap into the sign; the high word is what a mask leaves of the
    shifted product, and the low words keep their upper halves until the next mask.
    """
    a, b, c, d = counter
    for round_ in range(PHILOX_ROUNDS):
        keys = [(word + round_ * weyl) & WORD for word, weyl in zip(key, PHILOX_WEYL, strict=True)]
        of_a, of_c = a * PHILOX_MULTIPLIERS[0], c * PHILOX_MULTIPLIERS[1]
        a = (of_c >> 32).bitwise_xor_(b).bitwise_xor_(keys[0]).bitwise_and_(WORD)
        c = (of_a >> 32).bitwise_xor_(d).bitwise_xor_(keys[1]).bitwise_and_(WORD)
        b, d = of_c, of_a
    return a, b.bitwise_and_(WORD), c, d.bitwise_and_(WORD)


@torch.no_grad()
def measure(gradients: Tensor | Sequence[Tensor], *, norm: Norm) -> dict[str, float]:
    """The noise of k independent gradients of one matrix at the same weights: of ranks or of micro-batches.

    Noise is (g_1 - g_2)/√2, (g_3 - g_4)/√2 and so on, that of one gradient: for k = 2 the deviation from the
    mean times √(k/(k-1)). Gaussian noise has this law exactly. Stable noise comes out 2^(1/α-1/2) times too
    large, 12% at α = 1.5. Deviations from the mean of more than two gradients would be further off (17% for
    k = 4), because each large entry is in all k of them. They would also make the tail index look more
    certain than it is. If k is odd, the last gradient counts only in the mean.

    The signal is the mean of the k, so its norm holds noise too: pure Gaussian noise has a ratio of √k.

    Args:
        gradients: [k, r, c] or k times [r, c], whole matrices in any floating dtype; k >= 2. Computed
            in fp32, or in fp64 if they are fp64.
        norm: as `optim.geometry.parse_norm` gives. One of singular values costs k + 2 decompositions.

    Returns:
        tail_index, tail_index_error: of `hill` on all entries of the noise.
        noise_primal, noise_dual: mean ‖noise‖ and mean ‖noise‖_*.
        noise_to_signal_primal, noise_to_signal_dual: these over ‖·‖ and ‖·‖_* of the mean gradient; infinite
            if the mean is zero, NaN if the noise is zero too.

    Raises:
        ValueError: fewer than two gradients, or not of matrices.
    """
    stack = gradients if isinstance(gradients, Tensor) else torch.stack(list(gradients))
    if stack.dim() != 3 or len(stack) < 2:
        raise ValueError(f"gradients: two or more [r, c] make noise, not {list(stack.shape)}")
    stack = stack.to(wide(stack))
    mean = stack.mean(0, keepdim=True)
    noise = (stack[0 : len(stack) - 1 : 2] - stack[1::2]).mul_(sqrt(0.5))
    tail = hill(noise)
    primal, dual = (length(noise).double().mean() for length in (norm.value, norm.dual))
    signal_primal, signal_dual = (length(mean).double().squeeze() for length in (norm.value, norm.dual))
    return {
        "tail_index": tail.index,
        "tail_index_error": tail.standard_error,
        "noise_primal": primal.item(),
        "noise_dual": dual.item(),
        "noise_to_signal_primal": (primal / signal_primal).item(),
        "noise_to_signal_dual": (dual / signal_dual).item(),
    }
