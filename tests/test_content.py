"""Each kind of content has unit variance, and puts the large products where it says."""

import pytest
import torch

from dsa_bench.kernels import content
from dsa_bench.kernels.content import make_content
from dsa_bench.record import INPUT_KINDS

WIDTH = 128


def made(kind, num_keys=4096, num_queries=256, seed=0, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    return make_content(kind, num_keys=num_keys, num_queries=num_queries, width=width, generator=g)


def products(z, y):
    """Normalised products [queries, keys], -inf where a query does not see the key."""
    num_keys, num_queries = len(z), len(y)
    scores = y @ z.T / z.shape[1] ** 0.5
    positions = torch.arange(num_keys - num_queries, num_keys)
    return scores.masked_fill(torch.arange(num_keys) > positions[:, None], float("-inf"))


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_shapes_variance_and_seed(kind):
    z, y = made(kind, num_queries=1024)
    assert (z.shape, y.shape) == ((4096, WIDTH), (1024, WIDTH))
    assert z.dtype == y.dtype == torch.float32
    for x in (z, y):
        assert x.square().mean().item() == pytest.approx(1, abs=0.08)
    again, other = made(kind, num_queries=1024), made(kind, num_queries=1024, seed=1)
    assert torch.equal(z, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(z, other[0]) and not torch.equal(y, other[1])


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize(("num_keys", "num_queries"), [(1, 1), (3, 3), (5, 2), (300, 300)])
def test_few_keys(kind, num_keys, num_queries):
    z, y = made(kind, num_keys, num_queries)
    assert (z.shape, y.shape) == ((num_keys, WIDTH), (num_queries, WIDTH))
    assert z.isfinite().all() and y.isfinite().all()


def test_random_is_two_draws():
    g = torch.Generator().manual_seed(0)
    z, y = made("random", 50, 6)
    assert torch.equal(z, torch.randn(50, WIDTH, generator=g))
    assert torch.equal(y, torch.randn(6, WIDTH, generator=g))


@pytest.mark.parametrize("num_keys", [1, 256, 257, 5000])
def test_needles_stand_in_every_part(num_keys):
    found = content.needle_positions(num_keys, torch.Generator().manual_seed(1))
    assert (found // 256).tolist() == list(range(-(-num_keys // 256)))
    assert found.max() < num_keys


def test_two_needles_of_a_query_stand_clear_above_the_rest():
    scores = products(*made("needle", 8192, 512))
    best = scores.topk(3).values
    # the largest of 8192 random products lies near 4
    assert (best[:, 1] > 4.5).float().mean() > 0.95
    assert (best[:, 1] > best[:, 2] + 1).float().mean() > 0.9
    assert best[:, 2].mean() < 4.5
    favourites = scores.topk(2).indices.unique()
    assert 16 < len(favourites) < 48
    # they lie anywhere, not only near the query
    assert favourites.float().mean().item() == pytest.approx(4096, rel=0.2)


def test_a_query_takes_the_needles_that_it_sees():
    z, y = made("needle", 600, 600)
    scores = y @ z.T / WIDTH
    best = scores.masked_fill(torch.arange(600) > torch.arange(600)[:, None], -9).amax(1)
    first = content.needle_positions(600, torch.Generator().manual_seed(0))[0]
    assert first < 256
    # all draws of the first needle lie below 256, so each query from there on has one
    assert (best[256:] > 0.4).float().mean() > 0.97
    assert (best[:2] < 0.4).all()


def test_needles_are_seen_by_causal_queries_alone():
    z, y = made("needle", 600, 600)
    scores = y @ z.T / WIDTH
    future = torch.arange(600) > torch.arange(600)[:, None]
    assert (scores[future] > 0.5).float().mean() < 1e-4


def test_local_products_fall_with_the_distance():
    scores = torch.stack([products(*made("local", 2048, 64, seed)) for seed in range(8)])
    scores = scores * WIDTH**-0.5
    positions = torch.arange(2048 - 64, 2048)
    for distance in (0, 20, 69, 200):
        at = scores[:, torch.arange(64), positions - distance].mean().item()
        assert at == pytest.approx(content.NEAR * content.DECAY**distance, abs=0.04)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
def test_walk_is_the_recursion(length):
    noise = torch.randn(length, 3, generator=torch.Generator().manual_seed(2))
    expected = [noise[0]]
    for step in noise[1:]:
        expected.append(content.DECAY * expected[-1] + (1 - content.DECAY**2) ** 0.5 * step)
    torch.testing.assert_close(content.walk(noise), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_heavy_hitters_are_the_same_for_every_query():
    scores = products(*made("heavy", 8192, 256))
    favourites = scores.mean(0)[: 8192 - 256].topk(40)
    values = favourites.values
    assert set(range(content.SINKS)) <= set(favourites.indices[values > 3].tolist())
    assert 25 <= (values > 3).sum() <= content.SINKS + content.HEAVY_HITTERS
    expected = content.POPULAR * content.LIKING * WIDTH**0.5
    assert values[values > 3].mean().item() == pytest.approx(expected, rel=0.1)
    # what all queries share makes them like others a little, too
    assert values[-1] < 3


@pytest.mark.parametrize(
    ("kind", "num_queries", "sentence"),
    [
        ("neddle", 4, "kind must be one of random, needle, local, heavy, got 'neddle'"),
        ("random", 9, r"num_queries must be 1 … 8 \(the keys\), got 9"),
        ("random", 0, "num_queries must be 1 … 8"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, num_queries, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(kind, 8, num_queries)
