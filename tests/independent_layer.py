"""The whole attention layer a second time, written from the formulas alone, for tests.

It imports nothing of the package: its own YaRN, rotations, norms, Hadamard matrix, rounding to
e4m3, selection, and both forms of the attention, one query after the other.

Names: weights [out, in] under the names of the published checkpoint (`self_attn.q_a_proj.weight`
and so on), dequantised; hidden [L, hidden_size] of one whole prompt in fp32 or fp64, which is the
dtype of all arithmetic. Source: arXiv 2512.02556, section 2; DeepSeek-V3.2-Exp,
inference/model.py, with the non-interleaved rotation in the indexer (README, 2025-11-17).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

LATENT, ROPE, NOPE, VALUE, INDEX = 512, 64, 128, 128, 128
EPS = 1e-6
E4M3_MAX = 448.0

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What to compute; the second half are mistakes to make on purpose, right by default."""

    topk: int | None
    """Keys of a query; None is the dense layer of V3.1, without indexer."""
    form: str = "mqa"
    """`mqa`: queries are brought into the latent space; `mha`: keys and values out of it."""
    stored: torch.dtype | None = None
    """Every intermediate result that a model in bf16 stores is rounded to this; None: to none."""
    fp8_index: bool = False
    fp8_latent: bool = False
    fp8_products: bool = False
    """Inputs of the projections are rounded too, 128 of a row by one scale."""

    index_rotation: str = "half_split"
    main_rotation: str = "interleaved"
    index_rope_first: bool = True
    main_nope_first: bool = True
    key_norm_bias: bool = True
    key_norm_centred: bool = True
    scale_width: int = 192
    scale_mscale: bool = True
    index_query_normalised: bool = True
    stretched: bool = True
    """YaRN on; off: plain rotation."""


@dataclass(frozen=True)
class Result:
    out: torch.Tensor
    """[L, hidden_size]."""
    selected: list[set[int]]
    """The keys of each query."""
    scores: torch.Tensor
    """[L, L] of the indexer, -inf in the future; zeros in the dense layer."""
    kv: torch.Tensor
    """[L, 576]: what the latent cache holds."""
    index_k: torch.Tensor | None
    """[L, 128]: what the cache of the indexer holds."""

    def margins(self) -> torch.Tensor:
        """[L]: score of the last key inside minus that of the first one outside; inf: all inside.

        A selection by other arithmetic may differ where this is as small as the rounding.
        """
        margins = torch.full((len(self.selected),), math.inf, dtype=self.scores.dtype)
        for t, keys in enumerate(self.selected):
            outside = sorted(set(range(t + 1)) - keys)
            if outside:
                margins[t] = self.scores[t, sorted(keys)].min() - self.scores[t, outside].max()
        return margins


def run(
    weights: Weights,
    hidden: torch.Tensor,
    rules: Rules,
    *,
    selected: list[set[int]] | None = None,
) -> Result:
    """u_t of every token of a prompt; attends to `selected` instead, where it is given."""
    w = {name.removeprefix("self_attn."): t.to(hidden.dtype) for name, t in weights.items()}
    num_tokens = hidden.shape[0]
    turn = rotation(num_tokens, hidden.dtype, stretched=rules.stretched)
    down = _product(hidden, w["q_a_proj.weight"], rules)
    query_latent = _store(_rms_norm(down, w["q_a_layernorm.weight"]), rules)
    latent, key_rope = _main_keys(w, hidden, turn, rules)
    if rules.topk is None:
        scores, index_k = torch.zeros(num_tokens, num_tokens, dtype=hidden.dtype), None
    else:
        index_k = _index_keys(w, hidden, turn, rules)
        index_input = query_latent if rules.index_query_normalised else down
        scores = _index_scores(w, hidden, index_input, index_k, turn, rules)
    if selected is None:
        topk = num_tokens if rules.topk is None else rules.topk
        selected = [select(scores[t, : t + 1], topk) for t in range(num_tokens)]
    attend = {"mqa": _attend_mqa, "mha": _attend_mha}[rules.form]
    values = attend(w, query_latent, latent, key_rope, selected, turn, rules)
    out = _product(values, w["o_proj.weight"], rules)
    return Result(out, selected, scores, torch.cat([latent, key_rope], 1), index_k)


# arithmetic of its own


def frequencies(*, stretched: bool = True) -> list[float]:
    """32 angles a position: fast ones as trained, slow ones 40 times slower (YaRN), a ramp between.

    f_i = 10000^(-2i/64); ramp from i = 10 to 23; i of a wavelength that fits n times into the
    trained length: 64 ln(4096 / (2 pi n)) / (2 ln 10000), n = 32 and 1.
    """
    low = math.floor(64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000)))
    high = math.ceil(64 * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(10000)))
    result = []
    for i in range(32):
        fast = 10000 ** (-2 * i / 64)
        slowness = min(max((i - low) / (high - low), 0.0), 1.0) if stretched else 0.0
        result.append(fast * (1 - slowness) + fast / 40 * slowness)
    return result


def rotation(num_positions: int, dtype: torch.dtype, *, stretched: bool = True) -> torch.Tensor:
    """[positions, 32] complex numbers exp(j t f_i); the angle itself is an fp32 product."""
    steps = torch.tensor(frequencies(stretched=stretched), dtype=torch.float32)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * steps
    angles = angles.to(dtype)
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: torch.Tensor, turn: torch.Tensor, layout: str) -> torch.Tensor:
    """x [L, ..., 64]: as 32 complex numbers (2i, 2i+1) or (i, i+32), times turn [L, 32]."""
    first = range(0, 64, 2) if layout == "interleaved" else range(32)
    second = range(1, 64, 2) if layout == "interleaved" else range(32, 64)
    pairs = torch.complex(x[..., list(first)], x[..., list(second)])
    pairs = pairs * turn.reshape(turn.shape[0], *[1] * (x.dim() - 2), 32)
    out = torch.empty_like(x)
    out[..., list(first)] = pairs.real
    out[..., list(second)] = pairs.imag
    return out


def hadamard(n: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, n] of ±1 in Sylvester's order, not normalised."""
    if n == 1:
        return torch.ones(1, 1, dtype=dtype)
    half = hadamard(n // 2, dtype)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)], 0)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest number of e4m3, ties to even: 3 bits behind the leading one, smallest step 2^-9."""
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    exponent = torch.frexp(x).exponent - 1  # of the leading one
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    return (x / step).round() * step


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below x > 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def round_blocks(x: torch.Tensor, *, floor_of_scale: float | None = None) -> torch.Tensor:
    """To e4m3 and back, 128 numbers of a row with one scale, a power of two.

    The scale's floor is 1e-4 below amax (then divided by 448) or, in the latent cache, below
    amax / 448.
    """
    blocks = x.unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1, keepdim=True)
    if floor_of_scale is None:
        scale = amax.clamp(min=1e-4) / E4M3_MAX
    else:
        scale = (amax / E4M3_MAX).clamp(min=floor_of_scale)
    scale = power_of_two_above(scale)
    return (round_to_e4m3(blocks / scale) * scale).flatten(-2)


def select(scores: torch.Tensor, topk: int) -> set[int]:
    """Positions of the largest scores; of equal ones the earlier."""
    ranked = sorted(range(len(scores)), key=lambda s: (-float(scores[s]), s))
    return set(ranked[:topk])


def softmax_scale(rules: Rules) -> float:
    mscale = 0.1 * math.log(40) + 1 if rules.scale_mscale else 1.0
    return rules.scale_width**-0.5 * mscale**2


# steps of the layer


def _store(x: torch.Tensor, rules: Rules) -> torch.Tensor:
    return x if rules.stored is None else x.to(rules.stored).to(x.dtype)


def _product(x: torch.Tensor, weight: torch.Tensor, rules: Rules) -> torch.Tensor:
    return _store((round_blocks(x) if rules.fp8_products else x) @ weight.T, rules)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def _main_keys(
    w: Weights, hidden: torch.Tensor, turn: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """c [L, 512] and k^R [L, 64], which all heads share."""
    both = _product(hidden, w["kv_a_proj_with_mqa.weight"], rules)
    latent = _store(_rms_norm(both[:, :LATENT], w["kv_a_layernorm.weight"]), rules)
    key_rope = _store(rotate(both[:, LATENT:], turn, rules.main_rotation), rules)
    if rules.fp8_latent:  # 656 bytes: the rotated key beside the latent is bf16
        latent = round_blocks(latent, floor_of_scale=1e-4)
        key_rope = key_rope.to(torch.bfloat16).to(key_rope.dtype)
    return latent, key_rope


def _main_queries(
    w: Weights, query_latent: torch.Tensor, turn: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """q^C [L, H, 128] and q^R [L, H, 64]."""
    q = _product(query_latent, w["q_b_proj.weight"], rules).unflatten(-1, (-1, NOPE + ROPE))
    if rules.main_nope_first:
        nope, rope = q[..., :NOPE], q[..., NOPE:]
    else:
        rope, nope = q[..., :ROPE], q[..., ROPE:]
    return nope, _store(rotate(rope, turn, rules.main_rotation), rules)


def _index_vectors(x: torch.Tensor, turn: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Rotation by position on one half of [L, ..., 128], Hadamard on all, perhaps e4m3."""
    rope = slice(0, ROPE) if rules.index_rope_first else slice(INDEX - ROPE, INDEX)
    x = x.clone()
    x[..., rope] = _store(rotate(x[..., rope], turn, rules.index_rotation), rules)
    x = _store(x @ hadamard(INDEX, x.dtype) * INDEX**-0.5, rules)
    return round_blocks(x) if rules.fp8_index else x


def _index_keys(w: Weights, hidden: torch.Tensor, turn: torch.Tensor, rules: Rules) -> torch.Tensor:
    """k^I [L, 128], one for all index heads."""
    k = _product(hidden, w["indexer.wk.weight"], rules)
    if rules.key_norm_centred:
        k = k - k.mean(-1, keepdim=True)
    k = k / (k.square().mean(-1, keepdim=True) + EPS).sqrt() * w["indexer.k_norm.weight"]
    if rules.key_norm_bias:
        k = k + w["indexer.k_norm.bias"]
    return _index_vectors(_store(k, rules), turn, rules)


def _index_scores(
    w: Weights,
    hidden: torch.Tensor,
    query_latent: torch.Tensor,
    k: torch.Tensor,
    turn: torch.Tensor,
    rules: Rules,
) -> torch.Tensor:
    """I [L, L]: sum over the index heads j of w_j ReLU(q_j k_s), times 64^-1/2 128^-1/2."""
    q = _product(query_latent, w["indexer.wq_b.weight"], rules).unflatten(-1, (-1, INDEX))
    q = _index_vectors(q, turn, rules)
    head_weights = hidden @ w["indexer.weights_proj.weight"].T
    num_tokens, num_heads = head_weights.shape
    scores = torch.zeros(num_tokens, num_tokens, dtype=hidden.dtype)
    for j in range(num_heads):
        scores += head_weights[:, j, None] * (q[:, j] @ k.T).clamp(min=0)
    scores *= num_heads**-0.5 * INDEX**-0.5
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf)


def _up_projections(w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """W_UK and W_UV, both [H, 128, 512]."""
    both = w["kv_b_proj.weight"].reshape(-1, NOPE + VALUE, LATENT)
    return both[:, :NOPE], both[:, NOPE:]


def _attend_mqa(w, query_latent, latent, key_rope, selected, turn, rules) -> torch.Tensor:
    """[L, H * 128]: all heads look at the same keys [c ; k^R] and take the values c."""
    w_uk, w_uv = _up_projections(w)
    nope, rope = _main_queries(w, query_latent, turn, rules)
    rows = []
    for t, chosen in enumerate(selected):
        keys = sorted(chosen)
        absorbed = _store(torch.einsum("hd,hdc->hc", nope[t], w_uk), rules)
        logits = absorbed @ latent[keys].T + rope[t] @ key_rope[keys].T
        share = (logits * softmax_scale(rules)).softmax(-1)
        out_latent = _store(share @ latent[keys], rules)
        rows.append(_store(torch.einsum("hc,hdc->hd", out_latent, w_uv), rules).flatten())
    return torch.stack(rows)


def _attend_mha(w, query_latent, latent, key_rope, selected, turn, rules) -> torch.Tensor:
    """[L, H * 128]: every head has keys [W_UK c ; k^R] and values W_UV c of its own."""
    w_uk, w_uv = _up_projections(w)
    nope, rope = _main_queries(w, query_latent, turn, rules)
    heads = []
    for i in range(w_uk.shape[0]):
        key_nope = _store(latent @ w_uk[i].T, rules)
        value = _store(latent @ w_uv[i].T, rules)
        rows = []
        for t, chosen in enumerate(selected):
            keys = sorted(chosen)
            logits = key_nope[keys] @ nope[t, i] + key_rope[keys] @ rope[t, i]
            share = (logits * softmax_scale(rules)).softmax(-1)
            rows.append(share @ value[keys])
        heads.append(_store(torch.stack(rows), rules))
    return torch.cat(heads, 1)


def random_weights(
    *,
    hidden_size: int = 256,
    q_lora_rank: int = 128,
    num_heads: int = 3,
    index_heads: int = 2,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """fp32 weights in which everything counts: no norm is ones, no bias zero, no part small."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) * columns**-0.5

    def norm(width: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(width, generator=g)

    named = {
        "q_a_proj.weight": matrix(q_lora_rank, hidden_size),
        "q_a_layernorm.weight": norm(q_lora_rank),
        "q_b_proj.weight": matrix(num_heads * (NOPE + ROPE), q_lora_rank),
        "kv_a_proj_with_mqa.weight": matrix(LATENT + ROPE, hidden_size),
        "kv_a_layernorm.weight": norm(LATENT),
        "kv_b_proj.weight": matrix(num_heads * (NOPE + VALUE), LATENT),
        "o_proj.weight": matrix(hidden_size, num_heads * VALUE),
        "indexer.wq_b.weight": matrix(index_heads * INDEX, q_lora_rank),
        "indexer.wk.weight": matrix(INDEX, hidden_size),
        "indexer.k_norm.weight": norm(INDEX),
        "indexer.k_norm.bias": 0.5 * torch.randn(INDEX, generator=g),
        "indexer.weights_proj.weight": matrix(index_heads, hidden_size),
    }
    # a query that is the same everywhere, or larger by a common factor, ranks keys the same; so c^Q
    # before its norm is made uneven from token to token and from component to component
    named["q_a_proj.weight"] *= torch.linspace(0.5, 2.0, q_lora_rank)[:, None]
    return {f"self_attn.{name}": tensor for name, tensor in named.items()}


def random_hidden(num_tokens: int, hidden_size: int = 256, *, seed: int = 0) -> torch.Tensor:
    """[L, hidden_size] fp32, tokens of different lengths."""
    g = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(num_tokens, hidden_size, generator=g)
    return x * (0.5 + torch.rand(num_tokens, 1, generator=g))
