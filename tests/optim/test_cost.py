"""FLOPs of both forms of the orthogonalisation, by hand, and which matrix gets which."""

import itertools

import pytest

from optim.cost import GRAM_ASPECT, NUM_ITERATIONS, orthogonalize_flops, uses_gram
from optim.polar import METHODS
from training.model.shapes import SHAPES


@pytest.mark.parametrize(
    ("rows", "cols", "gram"),
    [(1, 1, False), (2, 3, False), (3, 2, False), (2, 4, True), (4, 2, True), (200, 300, False),
     (200, 301, True), (301, 200, True), (2048, 2048, False), (5504, 2048, True), (2048, 5504, True)],
)  # fmt: skip
def test_the_gram_form_is_for_sides_of_more_than_one_and_a_half_to_one(rows, cols, gram):
    assert GRAM_ASPECT == 1.5
    assert uses_gram(rows, cols) is gram


def test_the_standard_form_by_hand():
    # Five times, of a 2 x 3: XX' 2*2*2*3 = 24, A*A 2*8 = 16, P*X 24.
    assert orthogonalize_flops(2, 3) == orthogonalize_flops(3, 2) == 5 * (24 + 16 + 24)
    # With symmetric products at half their cost: XX' 12, A*A 8.
    assert orthogonalize_flops(2, 3, symmetric=True) == 5 * (12 + 8 + 24)


def test_the_gram_form_by_hand():
    # Of a 2 x 5, XX' and P*X are 2*2*2*5 = 40 each, and a product of two 2 x 2 is 16.
    # Before the restart: XX'; A*A, A <- PAP (two products); A*A; P*P; P*X.
    # After it: XX'; A*A, A <- PAP; A*A, P*P, A <- PAP; A*A; P*P; P*X.
    small = (1 + 2 + 1 + 1) + (1 + 2 + 1 + 1 + 2 + 1 + 1)
    assert small == 14
    assert orthogonalize_flops(2, 5) == orthogonalize_flops(5, 2) == 4 * 40 + small * 16
    # XX', A*A and the second product of A <- PAP are halved: 2 of 40, and 5 + 3 of the small ones.
    assert orthogonalize_flops(2, 5, symmetric=True) == 2 * 20 + 2 * 40 + 8 * 8 + (small - 8) * 16
    # In fp32 P*P and the first product of A <- PAP are halved as well: all of the small ones.
    assert orthogonalize_flops(2, 5, symmetric=True, polynomials=True) == 2 * 20 + 2 * 40 + small * 8
    # Without the restart: XX'; A*A, A <- PAP; three times A*A, P*P, A <- PAP; A*A; P*P; P*X.
    small = (1 + 2) + 3 * (1 + 1 + 2) + (1 + 1)
    assert small == 17
    assert orthogonalize_flops(2, 5, restart=False) == 2 * 40 + small * 16
    halved = orthogonalize_flops(2, 5, symmetric=True, polynomials=True, restart=False)
    assert halved == 20 + 40 + small * 8


def test_the_gram_form_starts_where_it_is_cheaper():
    """20n²m + 10n³ = 8n²m + 28n³ at m = 1.5n."""
    n = 512
    for m in range(n, 4 * n, 16):
        standard, gram = 20 * n * n * m + 10 * n**3, 8 * n * n * m + 28 * n**3
        assert orthogonalize_flops(n, m) == min(standard, gram)
        assert uses_gram(n, m) == (gram < standard)


def test_the_rectangles_of_the_1b4_cost_less_than_two_squares():
    """24 layers of 4 squares and 3 rectangles: the saving of the Gram form on 2048 x 5504 is 23%."""
    square, rectangle = orthogonalize_flops(2048, 2048), orthogonalize_flops(2048, 5504)
    assert square == 30 * 2048**3
    assert rectangle == 8 * 2048**2 * 5504 + 28 * 2048**3 < 2 * square
    standard = 20 * 2048**2 * 5504 + 10 * 2048**3
    assert rectangle / standard == pytest.approx(0.777, abs=0.01)
    total = sum(orthogonalize_flops(*s) * count for s, count in SHAPES["llama-1b4"].matrices().items())
    assert total == 96 * square + 72 * rectangle == pytest.approx(55.3e12, rel=0.01)


def test_the_cost_does_not_depend_on_the_orientation_and_grows_with_either_side():
    sizes = [1, 2, 3, 5, 8, 12, 13, 40]
    for rows, cols in itertools.product(sizes, sizes):
        for symmetric in (False, True):
            flops = orthogonalize_flops(rows, cols, symmetric=symmetric)
            assert flops == orthogonalize_flops(cols, rows, symmetric=symmetric) > 0
        assert orthogonalize_flops(rows, cols) < orthogonalize_flops(rows + 1, cols)
        assert orthogonalize_flops(rows, cols, symmetric=True) < orthogonalize_flops(rows, cols)


def test_the_cost_is_of_as_many_iterations_as_every_method_has():
    assert {len(method.coefficients) for method in METHODS.values()} == {NUM_ITERATIONS}
