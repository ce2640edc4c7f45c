"""What a step costs: FLOPs of orthogonalising a matrix, by form, and bytes of the passes. Pure: no torch.

k quintic iterations on an n x m matrix, n <= m, at 2 FLOPs per multiply-add:

                                                          k                    5 iterations
    standard    X <- aX + (bA + cA²)X, A = XXᵀ            4kn²m + 2kn³         20n²m + 10n³
    gram        the same polynomials on A, n x n, and X   8n²m + (8k - 12)n³    8n²m + 28n³
                multiplied twice: after step 2 and at the end

With kernels that compute half of a symmetric product: 15n²m + 5n³ and 6n²m + 20n³. A product of two
polynomials of A is symmetric but for its rounding; in fp32, and in fp16 on a GPU, half of it is computed too:
6n²m + 14n³. `_multiply_polynomials` in optim/polar.py says why not in bf16. The compiled step in fp32
(optim/kernels/native.cpp) has no restart and multiplies X once: 4n²m + 34n³, with halves 3n²m + 17n³.
"""

NUM_ITERATIONS = 5
# Bytes per element that the two passes over the shard move at the least: fp32 gradient 4, momentum there and
# back 8, bf16 update out 2; bf16 update in 2, fp32 weight there and back 8. And AdamW, all in fp32: gradient
# 4, two moments 16, weight 8.
PASS_BYTES, ADAMW_BYTES = 24, 28
GRAM_RESTART = 2  # iterations after which the Gram form multiplies X out and starts again (optim/polar.py)
GROUP_BYTES = 2 << 30  # on a GPU, of the matrices that live only during the iteration (optim/polar.py)
GRAM_ASPECT = 1.5  # m/n from which the Gram form is cheaper, whole products assumed


def uses_gram(rows: int, cols: int) -> bool:
    """Whether a rows x cols matrix gets the Gram form: only where that saves work."""
    short, long = sorted((rows, cols))
    return long > GRAM_ASPECT * short


def balances_lines(rows: int, cols: int, lines: str) -> bool:
    """Whether Aurora (optim/stages.py) balances a matrix: a tall one; with lines="larger" a wide one too."""
    return rows > cols or (rows < cols and lines == "larger")


def orthogonalize_flops(
    rows: int, cols: int, *, num_steps: int = NUM_ITERATIONS, symmetric: bool = False,
    polynomials: bool = False, restart: bool = True,
) -> int:  # fmt: skip
    """FLOPs to orthogonalise one matrix.

    Args:
        num_steps: iterations.
        symmetric: symmetric products cost half (optim/kernels/gpu.py, optim/kernels/native.cpp).
        polynomials: so do products of two polynomials of the Gram matrix; only with `symmetric`.
        restart: the Gram form starts again after GRAM_RESTART iterations.
    """
    short, long = sorted((rows, cols))
    square, cube = short * short * long, short**3
    if not uses_gram(rows, cols):
        return num_steps * (3 * square + cube if symmetric else 4 * square + 2 * cube)
    # Each stretch of k iterations: XXᵀ, PX, k times A², and k - 1 times two products for A and one for P.
    stretches = 2 if restart else 1
    halved, whole = 2 * num_steps - stretches, 2 * (num_steps - stretches)  # of the n x n products
    if not symmetric:
        return 4 * stretches * square + 2 * (halved + whole) * cube
    return 3 * stretches * square + (halved + (whole if polynomials else 2 * whole)) * cube
