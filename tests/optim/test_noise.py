"""Noise: draws against an integer oracle and closed forms, moments by quadrature, Hill on known tails."""

import hashlib
from math import atan, cos, erf, exp, gamma, inf, log, nan, pi, sin, sqrt

import pytest
import torch

from optim.noise import (
    CHUNK_ELEMENTS,
    KINDS,
    Noise,
    gaussian,
    gaussian_moment,
    philox,
    stable,
    stable_moment,
    student,
    student_moment,
)
from tests.optim.noise_samples import NOISES, draws, sample

WORD = 2**32 - 1


# --- the generator and its addresses ---


def philox_oracle(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as Salmon et al. 2011 define it."""
    (a, b, c, d), (k, l) = counter, key  # noqa: E741
    for _ in range(10):
        of_a, of_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (of_c >> 32) ^ b ^ k, of_c & WORD, (of_a >> 32) ^ d ^ l, of_a & WORD
        k, l = (k + 0x9E3779B9) & WORD, (l + 0xBB67AE85) & WORD  # noqa: E741
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # https://github.com/DEShawResearch/random123/blob/main/tests/kat_vectors
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    given = philox(tuple(torch.tensor([word]) for word in counter), key=tuple(key))
    assert [int(word) for word in given] == words == philox_oracle(counter, key)


def test_philox_agrees_with_python_on_random_counters():
    words = torch.randint(0, 2**32, (6, 300), generator=torch.Generator().manual_seed(0))
    for i in range(words.shape[1]):
        one = words[:, i].tolist()
        given = philox(tuple(words[:4, i : i + 1]), key=tuple(one[4:]))
        assert [int(word) for word in given] == philox_oracle(one[:4], one[4:])


@pytest.mark.parametrize("start", [0, 1, 77, 2**31 - 1, 2**33 + 1, 2**40])
@pytest.mark.parametrize("step", [0, 1, 2**32 + 7])
def test_an_element_is_a_function_of_seed_name_step_and_index(start, step):
    """Every address by hand, in integers and libm: what a resumed run relies on."""
    digest = hashlib.sha256(b"-3:layers.0.weight").digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    expected = []
    for i in range(start, start + 5):
        words = philox_oracle([(i // 2) & WORD, i // 2 >> 32, step & WORD, step >> 32], key)
        high, low = words[2:] if i % 2 else words[:2]
        u, v = ((high << 8 | low >> 24) + 0.5) / 2**40, ((low & 0xFFFFFF) + 0.5) / 2**24
        expected.append(0.5 * sqrt(-2 * log(u)) * cos(2 * pi * v))
    given = NOISES["gaussian"].sample("layers.0.weight", start=start, stop=start + 5, seed=-3, step=step)
    torch.testing.assert_close(given, torch.tensor(expected), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_gives_the_elements_of_the_whole(kind):
    """Over several chunks, bit for bit: pieces of every small size, and large ones across chunk borders."""
    noise, chunk = NOISES[kind], CHUNK_ELEMENTS
    whole = sample(noise, 3 * chunk + 501, seed=5, step=9)
    assert whole.dtype == torch.float32 and whole.shape == (3 * chunk + 501,)

    def cut(start, stop):
        return noise.sample("w", start=start, stop=stop, seed=5, step=9)

    generator = torch.Generator().manual_seed(0)
    for width in range(0, 300, 7):
        start = int(torch.randint(0, len(whole) - width, (), generator=generator))
        assert torch.equal(cut(start, start + width), whole[start : start + width])
    for start, stop in ((chunk - 1, chunk + 1), (1, 2 * chunk + 1), (chunk, 2 * chunk), (127, len(whole))):
        assert torch.equal(cut(start, stop), whole[start:stop])
    borders = [0, 1, 1024, 1025, chunk + 3, len(whole)]  # ranks with uneven shards, one of them empty
    pieces = [cut(a, b) for a, b in zip([0, *borders], [*borders, len(whole)], strict=True)]
    assert torch.equal(torch.cat(pieces), whole)


def test_threads_do_not_change_the_bits():
    before, one = torch.get_num_threads(), sample(NOISES["stable"], 100_000)
    torch.set_num_threads(2)
    two = sample(NOISES["stable"], 100_000)
    torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_streams_of_other_names_steps_and_seeds_are_uncorrelated():
    noise, count = NOISES["gaussian"], 40_000
    streams = [
        sample(noise, count),
        sample(noise, count, name="v"),
        sample(noise, count, seed=1),
        sample(noise, count, step=2),
        sample(noise, count, step=2**32 + 1),
        noise.sample("w", start=count, stop=2 * count, seed=0, step=1),
        noise.sample("w", start=1, stop=count + 1, seed=0, step=1),
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 4.5 / sqrt(count)  # 21 pairs at 1/√count each
    squares = torch.corrcoef(torch.stack(streams).square()) - torch.eye(len(streams))
    assert squares.abs().max() < 4.5 / sqrt(count)
    assert torch.equal(streams[0][1:], streams[-1][:-1])


def test_kinds_share_their_uniforms():
    """Paired comparisons: a large ν is the normal law, element by element."""
    near = sample(Noise("student", tail=1e7, moment=2.0), 10_000)
    torch.testing.assert_close(near, sample(Noise("gaussian"), 10_000), rtol=1e-5, atol=1e-6)


# --- distributions ---


def grid_moment(kind: str, p: float, tail: float) -> float:
    """E|x|^p over the unit square of the uniforms, by the midpoint rule, the tail at u → 0 spread out."""
    power = 3 if tail == inf else 3 / (1 - p / tail)
    y = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    u, weight = y**power, power * y ** (power - 1)
    if kind == "stable":  # symmetric about u = 1/2, with a tail at either end
        u = u / 2
    z = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    v, dv = z * z * (3 - 2 * z), 6 * z * (1 - z)  # smooth at both ends, where the exponential is singular
    grid_u, grid_v = (grid.reshape(-1) for grid in torch.meshgrid(u, v, indexing="ij"))
    values = KINDS[kind].variates(grid_u, grid_v, tail=tail).abs().pow(p).view(len(u), len(v))
    return ((values * dv).mean(1) * weight).mean().item()


@pytest.mark.parametrize(
    ("kind", "tail", "p"),
    [
        ("gaussian", inf, 2.0),
        ("gaussian", inf, 1.3),
        ("student", 1.5, 1.2),
        ("student", 2.0, 1.5),
        ("student", 3.0, 2.0),
        ("student", 40.0, 2.0),
        ("stable", 1.2, 1.05),
        ("stable", 1.5, 1.2),
        ("stable", 1.8, 1.5),
        ("stable", 2.0, 1.9),
    ],
)
def test_the_moment_is_the_one_set(kind, tail, p):
    """The closed forms equal the integral of the sampler itself: no sampling error, heavy tail or not."""
    closed = KINDS[kind].moment(p, tail=tail)
    assert grid_moment(kind, p, tail) == pytest.approx(closed, rel=2e-3)
    noise = Noise(kind, tail=tail, moment=p, scale=3.0)
    assert noise.unit**p * closed == pytest.approx(3.0**p, rel=1e-12)


def test_moments_in_known_cases():
    assert gaussian_moment(1.0) == pytest.approx(sqrt(2 / pi)) and gaussian_moment(2.0) == pytest.approx(1)
    assert student_moment(2.0, tail=3.0) == pytest.approx(3)  # ν/(ν-2)
    assert student_moment(1.0, tail=2.0) == pytest.approx(sqrt(2))  # of the density (2+x²)^(-3/2)
    assert student_moment(1.5, tail=1e6) == pytest.approx(gaussian_moment(1.5), rel=1e-5)
    assert stable_moment(0.5, tail=1.0) == pytest.approx(1 / cos(pi / 4))  # Cauchy: 1/cos(πp/2)
    assert stable_moment(1.5, tail=2.0) == pytest.approx(2**0.75 * gaussian_moment(1.5))


@pytest.mark.parametrize("noise", [Noise("gaussian", moment=1.5, scale=0.3), Noise("student", 5.0, 1.2, 2.0)])
def test_sampled_moments_where_the_mean_of_powers_converges(noise):
    powers = sample(noise, 400_000).double().abs() ** noise.moment
    error = powers.std() / sqrt(len(powers))
    assert abs(powers.mean() - noise.scale**noise.moment) < 4 * error < 0.02 * noise.scale**noise.moment


def cdf_error(values: torch.Tensor, cdf) -> float:
    """Kolmogorov's distance at 19 quantiles, times √n: above 1.95 for one sample in a thousand."""
    quantiles = torch.quantile(values[: 1 << 17], torch.linspace(0.05, 0.95, 19, dtype=values.dtype))
    return max(
        abs((values <= x).double().mean().item() - cdf(x.item())) * sqrt(len(values)) for x in quantiles
    )


def cauchy_cdf(x):
    return 0.5 + atan(x) / pi


def normal_cdf(x):
    return 0.5 + erf(x / sqrt(2)) / 2


def student_2_cdf(x):
    return 0.5 + x / (2 * sqrt(2 + x * x))


def student_3_cdf(x):
    return 0.5 + (atan(x / sqrt(3)) + x / sqrt(3) / (1 + x * x / 3)) / pi


def test_variates_have_their_distributions():
    u, v = draws(400_000, seed=1)
    for values, cdf in (
        (gaussian(u, v), normal_cdf),
        (student(u, v, tail=1.0), cauchy_cdf),
        (student(u, v, tail=2.0), student_2_cdf),
        (student(u, v, tail=3.0), student_3_cdf),
        (stable(u, v, tail=1.0), cauchy_cdf),
        (stable(u, v, tail=2.0), lambda x: normal_cdf(x / sqrt(2))),
    ):
        assert cdf_error(values, cdf) < 1.95
    assert cdf_error(student(u, v, tail=2.0), student_3_cdf) > 10  # the test tells neighbours apart
    assert cdf_error(stable(u, v, tail=1.1), cauchy_cdf) > 5
    torch.testing.assert_close(stable(u, v, tail=1.0), (pi * (u - 0.5)).tan())  # exactly


@pytest.mark.parametrize("tail", [0.7, 1.2, 1.5, 1.8, 1.95, 2.0])
def test_stable_variates_have_their_characteristic_function(tail):
    """E cos tx = exp(-|t|^α): bounded, so it converges whatever the tail."""
    u, v = draws(400_000, seed=2)
    x = stable(u, v, tail=tail)
    for t in (0.2, 0.7, 1.3, 2.5):
        waves = (t * x).cos()
        assert abs(waves.mean() - exp(-(t**tail))) < 4 * waves.std() / sqrt(len(x))
    assert abs((0.7 * x).sin().mean()) < 4 / sqrt(2 * len(x))  # symmetric


def test_injected_noise_has_its_distribution_in_units_of_its_scale():
    count = 400_000
    noise = Noise("student", tail=2.0, moment=1.5, scale=7.0)
    assert cdf_error(sample(noise, count).double() / noise.unit, student_2_cdf) < 1.95
    assert cdf_error(sample(NOISES["gaussian"], count).double(), lambda x: normal_cdf(x / 0.5)) < 1.95
    noise = Noise("stable", tail=1.6, moment=1.3, scale=1e-4)
    waves = (sample(noise, count).double() / noise.unit).cos()
    assert abs(waves.mean() - exp(-1)) < 4 * waves.std() / sqrt(count)
    # σ sets the p-th moment alone: the body of heavier noise of the same moment is smaller
    bodies = [sample(Noise("stable", a, 1.1), count).abs().median() for a in (1.15, 1.3, 1.6, 2.0)]
    assert bodies == sorted(bodies) and bodies[0] < 0.6 * bodies[-1]


def test_large_values_are_as_frequent_as_the_tail_says():
    """P(|x| > t) → C t^-α, with C = Γ(α) sin(πα/2)·2/π for stable laws and ν^(ν/2)/B(ν/2, 1/2)·2/ν for t."""
    count, rare = 1_000_000, 1e-4
    a, b = 1.5, 0.5
    constants = {
        "stable": gamma(a) * sin(pi * a / 2) * 2 / pi,
        "student": a ** (a / 2) * gamma(a / 2 + b) / (gamma(a / 2) * gamma(b)) * 2 / a,
    }
    for kind, constant in constants.items():
        noise = Noise(kind, tail=a, moment=1.2)
        threshold = noise.unit * (constant / rare) ** (1 / a)
        found = (sample(noise, count).double().abs() > threshold).sum().item()
        assert found == pytest.approx(count * rare, abs=30)  # Poisson, sd 10


def test_no_scale_is_no_noise_and_scale_is_linear():
    assert not sample(Noise("stable", 1.5, 1.2, 0.0), 1000).any()
    one, four = (sample(Noise("stable", 1.5, 1.2, scale), 1000) for scale in (1.0, 4.0))
    torch.testing.assert_close(four, 4 * one, rtol=1e-6, atol=0)
    assert len(sample(NOISES["student"], 0)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("levy", 1.5, 1.2, 1.0), r"noise\.kind: 'levy'; known are gaussian, student, stable"),
        (("gaussian", 1.5, 1.2, 1.0), r"noise\.tail: 1\.5, but that of gaussian is inf"),
        (("student", inf, 1.2, 1.0), r"noise\.tail: inf, but that of student is finite"),
        (("student", nan, 1.2, 1.0), r"noise\.tail: nan"),
        (("stable", 2.5, 1.2, 1.0), r"noise\.tail: 2\.5, but that of stable is in \(0, 2\]"),
        (("stable", 0.0, 1.2, 1.0), r"noise\.tail: 0\.0"),
        (("stable", 1.5, 1.5, 1.0), r"noise\.moment: 1\.5, but only moments below the tail index, 1\.5"),
        (("stable", 2.0, 2.0, 1.0), r"noise\.moment: 2\.0, but only moments below the tail index"),
        (("student", 3.0, 2.5, 1.0), r"noise\.moment: 2\.5, but it lies in \(1, 2\]"),
        (("student", 3.0, 1.0, 1.0), r"noise\.moment: 1\.0"),
        (("student", 3.0, nan, 1.0), r"noise\.moment: nan"),
        (("gaussian", inf, 2.0, -1.0), r"noise\.scale: -1\.0"),
        (("gaussian", inf, 2.0, inf), r"noise\.scale: inf"),
    ],
)
def test_errors_name_the_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        Noise(*arguments)
