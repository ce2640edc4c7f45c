"""Ownership plans: exact balance for the 1.4B, and every element travels once each way for any tiling."""

import itertools
import random
from collections import Counter

import pytest

from optim.ownership import Matrix, Plan, make_plan
from training.shapes import SHAPES

WORLDS = range(1, 9)


def cut_flat(shapes: list[tuple[int, int]], world_size: int) -> list[Matrix]:
    """Matrices laid end to end and cut into equal shards, as ZeRO 1 and 2 do."""
    total = sum(rows * cols for rows, cols in shapes)
    shard = -(-total // world_size)
    matrices, position = [], 0
    for index, (rows, cols) in enumerate(shapes):
        edges = [min(max(shard * rank - position, 0), rows * cols) for rank in range(world_size + 1)]
        holdings = tuple(itertools.pairwise(edges))
        matrices.append(Matrix(f"m{index}", rows, cols, holdings))
        position += rows * cols
    return matrices


def random_matrix(draw: random.Random, index: int, world_size: int) -> Matrix:
    """A matrix tiled at random: borders anywhere, ranks in any order, empty holdings anywhere."""
    rows, cols = draw.randint(1, 7), draw.randint(1, 7)
    numel = rows * cols
    if draw.random() < 0.2:
        return Matrix(f"m{index}", rows, cols, ((0, numel),) * world_size)
    num_holders = draw.randint(1, world_size)
    edges = [0, *sorted(draw.randint(0, numel) for _ in range(num_holders - 1)), numel]
    pieces = list(itertools.pairwise(edges))
    empty = draw.randint(0, numel)
    pieces += [(empty, empty)] * (world_size - num_holders)
    draw.shuffle(pieces)
    return Matrix(f"m{index}", rows, cols, tuple(pieces))


def random_matrices(seed: int, world_size: int) -> list[Matrix]:
    draw = random.Random(1000 * world_size + seed)
    return [random_matrix(draw, index, world_size) for index in range(draw.randint(0, 12))]


def exchange(plan: Plan, outgoing, incoming, read) -> tuple[list[list], int]:
    """All-to-all with Python lists: what each rank receives as (segment, elements), and how many crossed."""
    ranks = range(plan.world_size)
    buffers = {
        (a, b): [
            read(a, segment, i) for segment in outgoing(a, b) for i in range(segment.start, segment.stop)
        ]
        for a in ranks
        for b in ranks
    }
    received: list[list] = [[] for _ in ranks]
    for b in ranks:
        for a in ranks:
            buffer = iter(buffers[a, b])
            received[b] += [
                (segment, [next(buffer) for _ in range(segment.numel)]) for segment in incoming(a, b)
            ]
            assert next(buffer, None) is None, "the receiver expects less than was sent"
    return received, sum(len(buffer) for (a, b), buffer in buffers.items() if a != b)


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_element_travels_once_to_its_owner_and_once_back(world_size):
    for seed in range(25):
        check_traffic(make_plan(random_matrices(seed, world_size), world_size=world_size))


def check_traffic(plan: Plan) -> None:
    ranks = range(plan.world_size)

    # To the owners: rank r sends what it holds; element i of matrix m is the pair (m, i).
    def held(rank, segment, i):
        start, stop = plan.matrices[segment.matrix].holdings[rank]
        assert start <= i < stop
        return segment.matrix, i

    arrived, crossed_there = exchange(plan, plan.to_owner, plan.to_owner, held)
    for rank in ranks:
        places = Counter()
        for segment, elements in arrived[rank]:
            assert elements == [(segment.matrix, i) for i in range(segment.start, segment.stop)]
            places.update(elements)
        wanted = [(m, i) for m in plan.owned_by(rank) for i in range(plan.matrices[m].numel)]
        assert places == Counter(wanted)  # whole matrices, each element once, and nothing else

    # Back: what each rank holds, each element once, and only ever from the owner.
    def owned(rank, segment, i):
        assert plan.owners[segment.matrix] == rank
        return segment.matrix, i

    returned, crossed_back = exchange(plan, plan.from_owner, plan.from_owner, owned)
    for rank in ranks:
        places = Counter(element for _, elements in returned[rank] for element in elements)
        assert places == Counter(
            (m, i) for m, matrix in enumerate(plan.matrices) for i in range(*matrix.holdings[rank])
        )
    assert plan.elements_sent == crossed_there + crossed_back


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_matrix_has_one_owner_and_the_load_is_balanced(world_size):
    for seed in range(25):
        plan = make_plan(random_matrices(seed, world_size), world_size=world_size)
        owned = [index for rank in range(world_size) for index in plan.owned_by(rank)]
        assert sorted(owned) == list(range(len(plan.matrices)))
        # Largest first to the least loaded: the greatest load exceeds the mean by less than one matrix.
        flops = [matrix.flops for matrix in plan.matrices]
        bound = max(flops, default=0) * (world_size - 1) / max(sum(flops), 1)
        assert 0 <= plan.imbalance <= bound + 1e-12


@pytest.mark.parametrize("cut", ["flat", "replicated"])
def test_the_1b4_on_8_ranks_is_balanced_exactly(cut):
    shapes = [shape for shape, count in SHAPES["llama-1b4"].matrices().items() for _ in range(count)]
    random.Random(0).shuffle(shapes)
    matrices = cut_flat(shapes, 8)
    if cut == "replicated":
        matrices = [Matrix(m.name, m.rows, m.cols, ((0, m.numel),) * 8) for m in matrices]
    plan = make_plan(matrices, world_size=8)
    assert len(matrices) == 96 + 72
    for rank in range(8):
        sizes = Counter(max(matrices[i].rows, matrices[i].cols) for i in plan.owned_by(rank))
        assert sizes == {2048: 12, 5504: 9}
    assert plan.imbalance == 0
    total = sum(matrix.numel for matrix in matrices)
    if cut == "replicated":
        assert plan.elements_sent == 7 * total  # nothing there, seven copies back
    else:
        assert plan.elements_sent < 2 * total * 7 / 8  # less than a placement that ignores the holdings


def test_flops_and_imbalance_by_hand():
    # 2x3: XX' 2*2*2*3 = 24, A*A 2*8 = 16, BX 24.
    assert Matrix("m", 2, 3, ()).flops == Matrix("m", 3, 2, ()).flops == 64
    matrices = [Matrix(f"m{i}", 2, 3, ((0, 6), (6, 6))) for i in range(3)]
    plan = make_plan(matrices, world_size=2)
    assert sorted(len(plan.owned_by(rank)) for rank in range(2)) == [1, 2]
    assert plan.imbalance == pytest.approx(2 / 1.5 - 1)


def test_the_largest_is_placed_first_wherever_it_stands_in_the_list():
    sizes = [4, 4, 8]  # an 8x8 has 8 times the FLOPs of a 4x4: alone on one rank, whatever it holds
    matrices = [Matrix(f"m{i}", n, n, ((0, n * n), (n * n, n * n))) for i, n in enumerate(sizes)]
    assert make_plan(matrices, world_size=2).owners == (1, 1, 0)


def test_among_equal_loads_the_rank_that_holds_most_owns():
    matrices = [
        Matrix("a", 4, 4, ((0, 0), (0, 2), (2, 16))),
        Matrix("b", 4, 4, ((0, 7), (7, 16), (16, 16))),
        Matrix("c", 4, 4, ((0, 16), (16, 16), (16, 16))),
    ]
    plan = make_plan(matrices, world_size=3)
    assert plan.owners == (2, 1, 0)
    assert plan.elements_sent == 2 * (2 + 7)


def test_balance_comes_before_traffic():
    matrices = [Matrix(f"m{i}", 4, 4, ((0, 16), (16, 16))) for i in range(4)]
    assert Counter(make_plan(matrices, world_size=2).owners) == {0: 2, 1: 2}


def test_the_plan_is_the_same_on_every_call_and_follows_the_order_of_the_list():
    for seed in range(20):
        first, again = (make_plan(random_matrices(seed, 5), world_size=5) for _ in range(2))
        assert first == again
        ranks = range(5)
        for segments in (first.to_owner(a, b) for a in ranks for b in ranks):
            assert [s.matrix for s in segments] == sorted(s.matrix for s in segments)


def test_alone_nothing_is_sent_and_everything_is_owned():
    plan = make_plan(cut_flat([(8, 8), (3, 5)], 1), world_size=1)
    assert plan.owners == (0, 0) and plan.elements_sent == 0 and plan.imbalance == 0
    assert [s.numel for s in plan.to_owner(0, 0)] == [s.numel for s in plan.from_owner(0, 0)] == [64, 15]


def test_no_matrices_make_an_empty_plan():
    plan = make_plan([], world_size=3)
    assert plan.owners == () and plan.elements_sent == 0 and plan.imbalance == 0


def test_more_ranks_than_matrices_leave_some_without_work():
    plan = make_plan(cut_flat([(8, 8), (8, 8)], 8), world_size=8)
    assert sorted(len(plan.owned_by(rank)) for rank in range(8)) == [0] * 6 + [1] * 2


@pytest.mark.parametrize(
    ("holdings", "message"),
    [
        (((0, 5), (6, 12)), "elements 5 to 6"),
        (((0, 7), (6, 12)), "elements 7 to 6"),
        (((1, 6), (6, 12)), "elements 0 to 1"),
        (((0, 6), (6, 11)), "elements 11 to 12"),
        (((0, 6), (6, 13)), "elements 13 to 12"),
        (((0, 12), (0, 6)), "layer.weight"),
        (((0, 12), (3, 5)), "layer.weight"),
        (((0, 0), (0, 0)), "elements 0 to 12"),
        (((-1, 6), (6, 12)), "layer.weight"),
        (((0, 12),), "1 holdings for 2 ranks"),
        (((0, 4), (4, 8), (8, 12)), "3 holdings for 2 ranks"),
    ],
)
def test_gaps_and_overlaps_name_the_matrix(holdings, message):
    good = Matrix("good", 2, 2, ((0, 2), (2, 4)))
    with pytest.raises(ValueError, match=message) as raised:
        make_plan([good, Matrix("layer.weight", 3, 4, holdings)], world_size=2)
    assert str(raised.value).startswith("layer.weight: ")
