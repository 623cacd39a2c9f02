"""The Gluon kernels of dense attention, emulated on the CPU."""

import dataclasses

import pytest
import torch
from triton.runtime.jit import mangle_type

from dsa_bench import registry
from dsa_bench.baselines import dense_attention_gluon, dense_decode_gluon, dense_prefill_gluon
from dsa_bench.baselines.dense_attention import OPERATOR, DenseAttentionShape
from dsa_bench.operator import Machine, Unsupported
from tests import hostile
from tests.gluon_emulator import emulated_gluon

PREFILL = "dsa_bench.baselines.dense_prefill_gluon"
DECODE = "dsa_bench.baselines.dense_decode_gluon"


def make(phase, seq_len_q, seq_len_kv, num_heads, batch_size=1, sharpness=1, seed=0):
    width = (192, 128) if phase == "prefill" else (576, 512)
    shape = DenseAttentionShape(
        phase=phase, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, batch_size=batch_size,
        num_heads=num_heads, head_dim_qk=width[0], head_dim_v=width[1],
    )  # fmt: skip
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    return dataclasses.replace(inputs, q=(inputs.q.float() * sharpness).bfloat16())


def on_gpu(inputs):
    tensors = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    moved = {name: x.cuda() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(inputs, **moved)


def assert_right(inputs, outputs):
    for check in OPERATOR.check(inputs, outputs):
        assert check.passed, check


@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize(
    ("seed", "seq_len_q", "seq_len_kv", "num_heads", "sharpness"),
    [
        (0, 1, 1, 1, 1),
        (1, 1, 300, 2, 1),
        (2, 128, 512, 1, 1),
        (3, 130, 333, 3, 30),
        (4, 65, 1000, 1, 1),
        (5, 200, 200, 2, 30),
    ],
)
def test_prefill_emulated(seed, seq_len_q, seq_len_kv, num_heads, sharpness, ping_pong):
    inputs = make("prefill", seq_len_q, seq_len_kv, num_heads, sharpness=sharpness, seed=seed)
    with emulated_gluon(seed=seed) as emulated, hostile.poisoned_outputs():
        module = emulated.load(PREFILL)
        config = module.PrefillConfig(heads_together=2, ping_pong=ping_pong)
        outputs = module.prefill(
            inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale, config=config
        )
    assert_right(inputs, outputs)


@pytest.mark.interpret  # the merge of the parts is a Triton kernel
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("batch_size", "seq_len_q", "seq_len_kv", "num_heads"),
    [(1, 1, 1, 16), (2, 1, 300, 70), (1, 3, 129, 64)],
)
def test_decode_emulated(batch_size, seq_len_q, seq_len_kv, num_heads, num_splits):
    mangle_type(torch.zeros(1))  # its first call imports Gluon: the real one is wanted
    inputs = make("decode", seq_len_q, seq_len_kv, num_heads, batch_size, sharpness=10)
    with emulated_gluon(seed=num_splits) as emulated, hostile.poisoned_outputs():
        module = emulated.load(DECODE)
        config = module.DecodeConfig(num_splits=num_splits)
        outputs = module.decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale, config=config)
    assert_right(inputs, outputs)


@pytest.mark.interpret
def test_keys_of_the_next_sequence_do_not_leak():
    mangle_type(torch.zeros(1))
    inputs = make("decode", 1, 70, 16, batch_size=2)
    inputs.kv[1] = float("nan")
    with emulated_gluon(seed=1) as emulated:
        module = emulated.load(DECODE)
        outputs = module.decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale)
    assert all(c.passed for c in OPERATOR.check(inputs, outputs, rows=torch.tensor([0])))


@pytest.mark.parametrize(
    "config",
    [
        dense_prefill_gluon.PrefillConfig(heads_together=1),
        dense_decode_gluon.DecodeConfig(num_splits=1),
    ],
)
def test_registers_fit(config):
    assert 4 * (2 * config.consumer_registers + config.loader_registers) <= 12 * 168


@pytest.mark.parametrize(
    ("batch_size", "seq_len_kv", "splits"),
    # one sequence: every SM a part; 32: two parts a wave; 128 fill the GPU as they are
    [(1, 32768, 64), (32, 32768, 2), (128, 32768, 1), (1, 64, 1)],
)
def test_splits_fill_the_gpu(batch_size, seq_len_kv, splits):
    config = dense_decode_gluon.choose_config(
        batch_size=batch_size, seq_len_q=1, num_heads=128, seq_len_kv=seq_len_kv, num_sms=132
    )
    assert config.num_splits == splits


@pytest.mark.parametrize(("seq_len_q", "heads"), [(4096, 4), (1024, 16), (32768, 1), (1, 132)])
def test_heads_together_fill_the_gpu(seq_len_q, heads):
    config = dense_prefill_gluon.choose_prefill_config(seq_len_q=seq_len_q, num_sms=132)
    assert config.heads_together == heads


def test_supports_says_why_not():
    shape = DenseAttentionShape(
        phase="prefill", seq_len_q=1, seq_len_kv=1, head_dim_qk=256, head_dim_v=128
    )
    supports = registry.implementation("dense_attention", "gluon").supports
    reason = supports(shape, Machine(device="cuda", name="H100", capability=(9, 0)))
    assert "needs head widths 192/128 in prefill, this case has 256/128" in reason
    reason = supports(shape, Machine(device="cpu", name="a CPU"))
    assert "needs a Hopper GPU (sm_90), this is a CPU" in reason


def test_pages_are_refused():
    """`supports` says so of a case; inputs of one may still be handed over."""
    shape = DenseAttentionShape(
        phase="decode", seq_len_q=1, seq_len_kv=90, batch_size=2, num_heads=4, head_dim_qk=576,
        head_dim_v=512, lengths="spread",
    )  # fmt: skip
    with pytest.raises(Unsupported, match="decodes sequences of one length"):
        dense_attention_gluon.run(OPERATOR.make_inputs(shape, seed=0, device="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("sharpness", [1, 30])
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv", "num_heads"),
    [(1, 1, 1), (1, 300, 2), (77, 1000, 3), (130, 333, 3), (512, 512, 8), (1024, 4096, 16)],
)
def test_prefill_on_a_gpu(seq_len_q, seq_len_kv, num_heads, sharpness):
    inputs = make("prefill", seq_len_q, seq_len_kv, num_heads, sharpness=sharpness)
    inputs = on_gpu(inputs)
    with hostile.poisoned_outputs():
        outputs = dense_attention_gluon.run(inputs)
    assert_right(inputs, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize(
    ("batch_size", "seq_len_q", "seq_len_kv", "num_heads"),
    [(1, 1, 1, 16), (2, 1, 300, 70), (1, 3, 129, 64), (4, 2, 1000, 128), (3, 1, 8192, 128)],
)
def test_decode_on_a_gpu(batch_size, seq_len_q, seq_len_kv, num_heads, num_splits):
    inputs = make("decode", seq_len_q, seq_len_kv, num_heads, batch_size, sharpness=10)
    inputs = on_gpu(inputs)
    config = None if num_splits is None else dense_decode_gluon.DecodeConfig(num_splits=num_splits)
    with hostile.poisoned_outputs():
        outputs = dense_decode_gluon.decode(
            inputs.q, inputs.kv, sm_scale=inputs.sm_scale, config=config
        )
    assert_right(inputs, outputs)
