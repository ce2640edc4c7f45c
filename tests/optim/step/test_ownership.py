"""Ownership plans: exact balance for the 1.4B, and every element travels once each way for any tiling."""

import itertools
import random
from collections import Counter

import pytest

from optim.cost import orthogonalize_flops
from optim.step.ownership import SLACK, Matrix, OwnershipPlan, make_plan
from training.model.shapes import SHAPES

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


def cut_equally(shapes: list[tuple[int, int]], world_size: int) -> list[Matrix]:
    """Every matrix cut into equal pieces, as ZeRO 3 does."""
    matrices = []
    for index, (rows, cols) in enumerate(shapes):
        piece = -(-rows * cols // world_size)
        edges = [min(piece * rank, rows * cols) for rank in range(world_size + 1)]
        matrices.append(Matrix(f"m{index}", rows, cols, tuple(itertools.pairwise(edges))))
    return matrices


def replicate(shapes: list[tuple[int, int]], world_size: int) -> list[Matrix]:
    """Every matrix whole on every rank, as in ZeRO 0."""
    whole = [Matrix(f"m{index}", rows, cols, ()) for index, (rows, cols) in enumerate(shapes)]
    return [Matrix(m.name, m.rows, m.cols, ((0, m.numel),) * world_size) for m in whole]


def hidden_matrices(name: str) -> list[tuple[int, int]]:
    """Shapes of a model's hidden matrices, in the order in which a flat partition lays them out."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    parameters = SHAPES[name].parameters().items()
    return [size for parameter, size in parameters if len(size) == 2 and parameter not in tables]


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


def exchange(plan: OwnershipPlan, outgoing, incoming, read) -> tuple[list[list], int]:
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


def check_traffic(plan: OwnershipPlan) -> None:
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


@pytest.mark.parametrize("world_size", WORLDS)
def test_saving_traffic_never_costs_more_balance_than_the_slack(world_size):
    assert SLACK == 0.02
    for seed in range(25):
        matrices = random_matrices(seed, world_size)
        loads = [0] * world_size
        for flops in sorted((matrix.flops for matrix in matrices), reverse=True):
            loads[loads.index(min(loads))] += flops
        limit = max(max(loads), sum(loads) / world_size * (1 + SLACK))
        assert max_load(make_plan(matrices, world_size=world_size)) <= limit


def max_load(plan: OwnershipPlan) -> int:
    return max(sum(plan.matrices[i].flops for i in plan.owned_by(rank)) for rank in range(plan.world_size))


@pytest.mark.parametrize("cut", [cut_flat, cut_equally, replicate])
def test_the_1b4_on_8_ranks_is_balanced_exactly_and_sends_no_more_than_any_plan_must(cut):
    matrices = cut(hidden_matrices("llama-1b4"), 8)
    plan = make_plan(matrices, world_size=8)
    assert len(matrices) == 96 + 72
    for rank in range(8):
        sizes = Counter(max(matrices[i].rows, matrices[i].cols) for i in plan.owned_by(rank))
        assert sizes == {2048: 12, 5504: 9}
    assert plan.imbalance == 0
    total = sum(matrix.numel for matrix in matrices)
    # Flat: a rank's shard is three whole layers. Equal cuts: 7/8 of everything, there and back. Replicated:
    # nothing there, 7 copies back.
    expected = {cut_flat: 0, cut_equally: 2 * total * 7 // 8, replicate: 7 * total}[cut]
    assert plan.elements_sent == plan.minimum_elements_sent == expected


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ["llama-1b4", "llama-2-7b", "llama-350m"])
def test_real_models_are_balanced_within_2_percent_and_equal_cuts_send_the_minimum(name, world_size):
    """Measured: imbalance up to 1.8%; of traffic, 1.4e-7 above a bound that the last, shorter piece sets."""
    shapes = hidden_matrices(name)
    for cut in (cut_flat, cut_equally, replicate):
        plan = make_plan(cut(shapes, world_size), world_size=world_size)
        assert plan.imbalance <= 0.02
        if cut is not cut_flat:
            assert plan.minimum_elements_sent <= plan.elements_sent <= 1.05 * plan.minimum_elements_sent


def test_in_any_order_the_1b4_is_balanced_and_most_of_it_stays_where_it_lies():
    """Squares cost more per element than rectangles, so equal shards are unequal work and some must travel.

    Measured: at most 10% of the elements; without regard to where they lie 88% would.
    """
    shapes = hidden_matrices("llama-1b4")
    total = sum(rows * cols for rows, cols in shapes)
    for seed in range(5):
        random.Random(seed).shuffle(shapes)
        plan = make_plan(cut_flat(shapes, 8), world_size=8)
        assert plan.imbalance <= SLACK
        assert plan.minimum_elements_sent < plan.elements_sent < 0.15 * 2 * total


def test_flops_and_imbalance_by_hand():
    for rows, cols in ((2, 3), (3, 2), (2, 5)):
        assert Matrix("m", rows, cols, ()).flops == orthogonalize_flops(rows, cols)
    assert orthogonalize_flops(2, 3) == 320
    matrices = [Matrix(f"m{i}", 2, 3, ((0, 6), (6, 6))) for i in range(3)]
    plan = make_plan(matrices, world_size=2)
    assert sorted(len(plan.owned_by(rank)) for rank in range(2)) == [1, 2]
    assert plan.imbalance == pytest.approx(2 / 1.5 - 1)


# --- the least that can be sent ---------------------------------------------------------------------------


def traffic(matrices: list[Matrix], owners: tuple[int, ...], world_size: int) -> int:
    """Elements that cross, from the definition: what an owner lacks comes and goes."""
    return sum(
        matrix.numel * (world_size - 1) if matrix.replicated else 2 * (matrix.numel - matrix.held_by(owner))
        for matrix, owner in zip(matrices, owners, strict=True)
    )


def small_cases(cut: str, world_size: int) -> list[list[Matrix]]:
    """150 lists of at most 6 matrices, cut in one way."""
    found = []
    for seed in range(150):
        draw = random.Random(f"{cut} {world_size} {seed}")
        count = draw.randint(1, 6)
        if cut == "random":
            found.append([random_matrix(draw, index, world_size) for index in range(count)])
            continue
        shapes = [(draw.choice((4, 6, 8)), draw.choice((4, 6, 8, 16))) for _ in range(count)]
        found.append({"flat": cut_flat, "equal": cut_equally}[cut](shapes, world_size))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("cut", ["flat", "equal", "random"])
def test_the_minimum_is_one_and_traffic_is_counted_right(cut, world_size):
    for matrices in small_cases(cut, world_size):
        plan = make_plan(matrices, world_size=world_size)
        assert plan.elements_sent == traffic(matrices, plan.owners, world_size)
        every = itertools.product(range(world_size), repeat=len(matrices))
        least = min(traffic(matrices, owners, world_size) for owners in every)
        assert plan.minimum_elements_sent == least


def excess(plan: OwnershipPlan) -> float:
    """Traffic over that of the best plan whose largest load is no greater, found by trying all; from 1."""
    flops, best = [matrix.flops for matrix in plan.matrices], None
    for owners in itertools.product(range(plan.world_size), repeat=len(flops)):
        loads = [0] * plan.world_size
        for owner, cost in zip(owners, flops, strict=True):
            loads[owner] += cost
        if max(loads) <= max_load(plan):
            sent = traffic(plan.matrices, owners, plan.world_size)
            best = sent if best is None else min(best, sent)
    assert best is not None and best <= plan.elements_sent
    return 1.0 if plan.elements_sent == best else plan.elements_sent / max(best, 1)


too_local_a_search = pytest.mark.xfail(
    strict=True,
    reason="make_plan only improves largest-first scheduling, by moves and exchanges of two: up to 5% of "
    "small flat cuts and 12% of random ones are beyond (worst: 384 elements where none need travel)",
)


@pytest.mark.parametrize(
    ("cut", "world_size"),
    [
        ("equal", 2),
        ("equal", 3),
        *(pytest.param(cut, n, marks=too_local_a_search) for cut in ("flat", "random") for n in (2, 3)),
    ],
)
def test_traffic_is_within_5_percent_of_the_best_plan_that_is_as_balanced(cut, world_size):
    found = [excess(make_plan(matrices, world_size=world_size)) for matrices in small_cases(cut, world_size)]
    beyond = [ratio for ratio in found if ratio > 1.05]
    assert len(beyond) <= 0.01 * len(found), sorted(beyond)


def names_and_worlds() -> list:
    """Every named model on 2 to 8 ranks."""
    every = itertools.product(SHAPES, range(2, 9))
    return [pytest.param(*c, marks=too_local_a_search) if c == ("llama-60m", 5) else c for c in every]


@pytest.mark.parametrize(("name", "world_size"), names_and_worlds())
def test_where_owning_what_one_holds_is_balanced_nothing_else_is_sent(name, world_size):
    matrices = cut_flat(hidden_matrices(name), world_size)
    plan = make_plan(matrices, world_size=world_size)
    home = [max(range(world_size), key=matrix.held_by) for matrix in matrices]
    at_home = OwnershipPlan(tuple(matrices), tuple(home), world_size)
    if max_load(at_home) <= max(max_load(plan), sum(m.flops for m in matrices) / world_size * (1 + SLACK)):
        assert plan.elements_sent == at_home.elements_sent == plan.minimum_elements_sent


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
