"""The second implementation of the layer against itself, torch's e4m3, and numbers by hand."""

import ast
import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import independent_layer as layer
from tests.independent_layer import Rules

LENGTH = 40
WEIGHTS = layer.random_weights()
HIDDEN = layer.random_hidden(LENGTH).double()


@functools.cache
def outputs(**rules):
    return layer.run(WEIGHTS, HIDDEN, Rules(**rules))


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_it_is_independent():
    tree = ast.parse(Path(layer.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"math", "torch", "collections.abc", "dataclasses"}


def test_frequencies_by_hand():
    f = layer.frequencies()
    plain = layer.frequencies(stretched=False)
    assert f[0] == 1.0
    assert plain[16] == pytest.approx(0.01)
    assert f[:11] == plain[:11]
    assert f[23:] == pytest.approx([x / 40 for x in plain[23:]])
    # i = 15: 5/13 of the way from trained to stretched
    assert f[15] == pytest.approx(10000 ** (-30 / 64) * (8 / 13 + 5 / 13 / 40))


def test_softmax_scale_by_hand():
    assert layer.softmax_scale(Rules(topk=1)) == pytest.approx(0.1352338, abs=5e-8)


@pytest.mark.parametrize(("layout", "partner"), [("interleaved", 5), ("half_split", 36)])
def test_rotation_by_hand(layout, partner):
    first = 4
    pair = 2 if layout == "interleaved" else 4  # of 32
    x = torch.zeros(3, 64, dtype=torch.float64)
    x[:, first] = 1.0
    y = layer.rotate(x, layer.rotation(3, torch.float64), layout)
    angle = 2 * 10000 ** (-2 * pair / 64)
    assert y[2, first] == pytest.approx(math.cos(angle), abs=1e-6)
    assert y[2, partner] == pytest.approx(math.sin(angle), abs=1e-6)
    assert y[2].count_nonzero() == 2
    assert torch.equal(y[0], x[0])


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_rotated_products_depend_on_the_distance_alone(layout):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, generator=g, dtype=torch.float64)
    turn = layer.rotation(30, torch.float64)
    queries = layer.rotate(q.expand(30, 64), turn, layout)
    keys = layer.rotate(k.expand(30, 64), turn, layout)
    products = queries @ keys.T
    assert products[25, 20] == pytest.approx(float(products[5, 0]), abs=1e-4)
    assert abs(products[25, 20] - products[25, 25]) > 1e-2


def test_hadamard_by_hand():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert layer.hadamard(4, torch.float64).tolist() == expected
    h = layer.hadamard(128, torch.float64)
    assert torch.equal(h @ h.T, 128 * torch.eye(128, dtype=torch.float64))


def test_rounding_is_that_of_torch():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    between = (numbers[1:] + numbers[:-1]) / 2
    g = torch.Generator().manual_seed(0)
    anywhere = torch.randn(20000, generator=g, dtype=torch.float64)
    wide = anywhere * torch.logspace(-4, 2.2, 20000, dtype=torch.float64)
    x = torch.cat([numbers, between, between + 1e-7, between - 1e-7, wide]).clamp(-448, 448)
    expected = x.float().to(torch.float8_e4m3fn).double()
    assert torch.equal(layer.round_to_e4m3(x.float().double()), expected)


def test_scales_by_hand():
    x = torch.tensor([1.0, 1.001, 0.25, 3.0, 2.0**-22])
    assert layer.power_of_two_above(x).tolist() == [1.0, 2.0, 0.25, 4.0, 2.0**-22]
    row = torch.zeros(1, 256)
    row[0, 0], row[0, 1], row[0, 128] = 449.0, 17.0, 18.0
    # 449 needs scale 2, which makes 224.5 of it; 17 / 2 lies between 8 and 9: to even; 18 is exact
    assert layer.round_blocks(row)[0, [0, 1, 128]].tolist() == [448.0, 16.0, 18.0]
    tiny = torch.full((1, 128), 2.0**-23)
    # floors: 2^-22 makes of it 0.5 steps of 2^-9 times 2^8, exact; 2^-13 makes of it 2^-10, to even
    assert torch.equal(layer.round_blocks(tiny), tiny)
    assert torch.equal(layer.round_blocks(tiny, floor_of_scale=1e-4), torch.zeros(1, 128))


def test_equal_scores_go_to_the_earlier_key():
    assert layer.select(torch.tensor([1.0, 3.0, 0.0, 3.0, 1.0, 1.0]), 3) == {0, 1, 3}
    assert layer.select(torch.tensor([-1.0, -3.0]), 3) == {0, 1}


@pytest.mark.parametrize("topk", [None, 1, 9, LENGTH])
def test_forms_are_equal(topk):
    mqa, mha = outputs(topk=topk), outputs(topk=topk, form="mha")
    assert mqa.selected == mha.selected
    assert relative(mqa.out, mha.out) < 1e-12


def test_enough_keys_make_it_dense():
    dense = outputs(topk=None)
    assert relative(outputs(topk=LENGTH).out, dense.out) == 0
    sparse = outputs(topk=9)
    assert torch.equal(sparse.out[:9], dense.out[:9])
    assert relative(sparse.out[9:], dense.out[9:]) > 0.1
    assert [len(keys) for keys in sparse.selected] == [min(t + 1, 9) for t in range(LENGTH)]


@pytest.mark.parametrize("topk", [None, 9])
def test_the_future_does_not_count(topk):
    changed = HIDDEN.clone()
    changed[25:] = layer.random_hidden(LENGTH - 25, seed=7).double()
    result = layer.run(WEIGHTS, changed, Rules(topk=topk))
    assert relative(result.out[:25], outputs(topk=topk).out[:25]) < 1e-12
    assert relative(result.out[25:], outputs(topk=topk).out[25:]) > 0.1


def test_two_tokens_by_hand():
    """Latents of two tokens, weighed by the softmax of two logits, without any shared step."""
    w = {name.removeprefix("self_attn."): t.double() for name, t in WEIGHTS.items()}

    def norm(x, weight):
        return weight * x / math.sqrt(float((x * x).sum()) / len(x) + 1e-6)

    def turned(x):  # at position 1
        y = x.clone()
        for i, f in enumerate(layer.frequencies()):
            c, s, a, b = math.cos(f), math.sin(f), x[2 * i], x[2 * i + 1]
            y[2 * i], y[2 * i + 1] = a * c - b * s, a * s + b * c
        return y

    down = [w["kv_a_proj_with_mqa.weight"] @ h for h in HIDDEN[:2]]
    c = [norm(x[:512], w["kv_a_layernorm.weight"]) for x in down]
    keys = [down[0][512:], turned(down[1][512:])]
    q_latent = norm(w["q_a_proj.weight"] @ HIDDEN[1], w["q_a_layernorm.weight"])
    q = (w["q_b_proj.weight"] @ q_latent).reshape(3, 192)
    values = []
    for i in range(3):
        up = w["kv_b_proj.weight"][256 * i : 256 * (i + 1)]
        logits = [
            0.1352338 * float(q[i, :128] @ (up[:128] @ c[s]) + turned(q[i, 128:]) @ keys[s])
            for s in range(2)
        ]
        share = 1 / (1 + math.exp(logits[0] - logits[1]))
        values.append(up[128:] @ (c[0] * (1 - share) + c[1] * share))
    expected = w["o_proj.weight"] @ torch.cat(values)
    for topk in (None, 2):
        actual = layer.run(WEIGHTS, HIDDEN[:2], Rules(topk=topk)).out[1]
        assert relative(actual, expected) < 1e-6
    first = torch.cat(
        [w["kv_b_proj.weight"][256 * i + 128 : 256 * (i + 1)] @ c[0] for i in range(3)]
    )
    assert relative(outputs(topk=1).out[0], w["o_proj.weight"] @ first) < 1e-12


def test_scores_by_hand():
    """Index scores from the formula of the paper, without Hadamard: it changes no product."""
    w = {name.removeprefix("self_attn."): t.double() for name, t in WEIGHTS.items()}
    q_latent = HIDDEN @ w["q_a_proj.weight"].T
    q_latent = torch.nn.functional.rms_norm(q_latent, (128,), w["q_a_layernorm.weight"], 1e-6)
    q = (q_latent @ w["indexer.wq_b.weight"].T).unflatten(1, (2, 128))
    affine = (w["indexer.k_norm.weight"], w["indexer.k_norm.bias"])
    k = torch.nn.functional.layer_norm(HIDDEN @ w["indexer.wk.weight"].T, (128,), *affine, 1e-6)
    t, s = 21, 8

    def turned(x, position):
        y = x.clone()
        for i, f in enumerate(layer.frequencies()):
            cos, sin = math.cos(position * f), math.sin(position * f)
            y[i], y[i + 32] = x[i] * cos - x[i + 32] * sin, x[i] * sin + x[i + 32] * cos
        return y

    weights = w["indexer.weights_proj.weight"] @ HIDDEN[t]
    expected = sum(
        float(weights[j]) * max(float(turned(q[t, j], t) @ turned(k[s], s)), 0.0) for j in range(2)
    )
    scores = outputs(topk=3).scores
    assert float(scores[t, s]) == pytest.approx(expected * 2**-0.5 * 128**-0.5, rel=1e-5)
    assert expected != 0
    assert scores[s, t] == -math.inf


def test_margins_tell_how_near_a_selection_was():
    result = outputs(topk=9)
    margins = result.margins()
    assert margins[:9].isinf().all()
    assert (margins[9:] >= 0).all()
    t = 30
    ranked = result.scores[t, : t + 1].sort(descending=True).values
    assert margins[t] == ranked[8] - ranked[9]


@pytest.mark.parametrize(
    ("name", "least"), [("fp8_index", 0.0), ("fp8_latent", 3e-3), ("fp8_products", 1e-2)]
)
def test_rounding_changes_the_outputs_a_little(name, least):
    exact, rounded = outputs(topk=LENGTH), outputs(topk=LENGTH, **{name: True})
    error = float((rounded.out - exact.out).norm() / exact.out.norm())
    assert least <= error < 0.1
    scores = outputs(topk=9, **{name: True}).scores.tril()
    spread = float((scores - exact.scores.tril()).norm() / exact.scores.tril().norm())
    assert (spread == 0) if name == "fp8_latent" else 5e-3 < spread < 0.1


MISTAKES = {
    "interleaved-in-the-indexer": {"index_rotation": "interleaved"},
    "half-split-in-the-core": {"main_rotation": "half_split"},
    "index-split-swapped": {"index_rope_first": False},
    "main-split-swapped": {"main_nope_first": False},
    "key-norm-without-bias": {"key_norm_bias": False},
    "key-norm-without-mean": {"key_norm_centred": False},
    "scale-of-576": {"scale_width": 576},
    "no-mscale": {"scale_mscale": False},
    "index-query-not-normalised": {"index_query_normalised": False},
    "no-yarn": {"stretched": False},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show(name):
    right, wrong = outputs(topk=9), outputs(topk=9, **MISTAKES[name])
    assert relative(wrong.out, right.out) > 1e-2, name


def test_mistakes_are_all_covered():
    """Every rule of the second half is broken by one of them."""
    fields = list(Rules.__dataclass_fields__)
    own = set(fields[fields.index("index_rotation") :])
    assert {name for change in MISTAKES.values() for name in change} == own
    assert all(replace(Rules(topk=1), **change) != Rules(topk=1) for change in MISTAKES.values())
