"""The emulator runs a right kernel right, and finds the errors planted in it."""

import sys

import pytest
import torch
from torch import Tensor

from tests.gluon_emulator import Deadlock, EmulationError, emulated_gluon
from tests.gluon_emulator.asm import histogram_add, list_append, ticket_counter, word_read

NUM_TILES = 6
NUM_ROWS = 300


def run_ring(seed: int, bug: str = "") -> tuple[Tensor, Tensor]:
    """(what the emulated kernel gives, what it should give)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 64, generator=generator).bfloat16()
    kv = torch.randn(NUM_ROWS, 64, generator=generator).bfloat16()
    index = torch.randint(0, NUM_ROWS, (NUM_TILES * 64,), generator=generator, dtype=torch.int32)
    index[3], index[70], index[71] = -1, NUM_ROWS, 2**31 - 1
    out = torch.full((64, 64), float("nan"))
    with emulated_gluon(seed=seed) as emulated:
        kernels = emulated.load("tests.gluon_ring")
        kernels.ring_kernel[(1,)](
            x, kv, index, out, NUM_ROWS, NUM_TILES=NUM_TILES, BUG=bug, num_warps=4
        )
    valid = (index >= 0) & (index < NUM_ROWS)
    rows = kv.float()[torch.where(valid, index, 0).long()] * valid[:, None]
    return out, (x.float() @ rows.view(NUM_TILES, 64, 64).mT).sum(0)


@pytest.mark.parametrize("seed", range(6))
def test_right_kernel_is_right(seed):
    actual, expected = run_ring(seed)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bug", ["missing_wait", "early_free", "wrong_parity"])
def test_planted_bug_is_found(bug):
    def is_found(seed: int) -> bool:
        try:
            actual, expected = run_ring(seed, bug)
        except Deadlock:
            return True
        return not torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)

    assert any(is_found(seed) for seed in range(24))


def run_staging(seed: int, bug: str = "") -> bool:
    """Whether the emulated kernel gives what it should."""
    x = torch.randn(NUM_TILES * 64, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    out = torch.full_like(x, float("nan"))
    with emulated_gluon(seed=seed) as emulated:
        kernels = emulated.load("tests.gluon_ring")
        kernels.staging_kernel[(1,)](x, out, NUM_TILES=NUM_TILES, BUG=bug, num_warps=4)
    return torch.equal(out, 2 * x)


def test_a_tile_that_is_given_away_before_it_is_read_back_is_found():
    assert all(run_staging(seed) for seed in range(6))
    assert not all(run_staging(seed, "early_free") for seed in range(24))


def test_deadlock_names_who_waits_on_what():
    message = r"_gather#1 waits on barrier 3\[0\] parity 0 .*_multiply#0 waits on barrier 2\[0\]"
    with pytest.raises(Deadlock, match=message):
        run_ring(0, "missing_arrive")


def test_missing_fence_is_refused():
    with pytest.raises(EmulationError, match="no fence_async_shared"):
        run_ring(0, "missing_fence")


def test_everything_is_restored():
    import triton.experimental.gluon.language as real

    before, methods = set(sys.modules), (torch.Tensor.to, torch.Tensor.type)
    run_ring(0)
    import triton.experimental.gluon.language as again

    assert again is real
    assert sys.modules["triton.experimental"].gluon.language is real
    assert not {name for name in set(sys.modules) - before if "gluon_ring" in name}
    assert (torch.Tensor.to, torch.Tensor.type) == methods


@pytest.fixture
def language():
    """(gluon.jit, gl) of the emulator, with models of shared-memory atomics."""
    models = {
        "take": ticket_counter(40),
        "append": list_append(40, 32, (0, 64)),
        "count": word_read(40),
        "histogram": histogram_add(0),
    }
    with emulated_gluon(asm=models):
        from triton.experimental import gluon
        from triton.experimental.gluon import language

        yield gluon.jit, language


def test_masked_lane_is_undefined_and_reads_nothing(language):
    jit, gl = language

    @jit
    def kernel(x_ptr, out_ptr, n):
        offs = gl.arange(0, 8)
        gl.store(out_ptr + offs, gl.load(x_ptr + offs, mask=offs < n, other=-1.0))
        gl.store(out_ptr + 8 + offs, gl.load(x_ptr + offs, mask=offs < n), mask=offs < 6)

    out = torch.zeros(16)
    kernel[(1,)](torch.arange(5.0), out, 5)
    assert out[:8].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert out[8:13].tolist() == [0, 1, 2, 3, 4]
    assert out[13].isnan()
    assert out[14:].tolist() == [0, 0]
    with pytest.raises(EmulationError, match=r"access at 0 \.\. 5 of a tensor of 5 elements"):
        kernel[(1,)](torch.arange(5.0), out, 6)


def test_bits_and_constants(language):
    jit, gl = language
    shift = gl.constexpr(31)

    @jit
    def kernel(x_ptr, signed_ptr, unsigned_ptr, N: gl.constexpr):
        gl.static_assert(N == 4, "N is a plain number")
        offs = gl.arange(0, N)
        x = gl.load(x_ptr + offs)
        signed = x.to(gl.int32, bitcast=True)
        gl.store(signed_ptr + offs, signed ^ ((signed >> shift) & 0x7FFFFFFF))
        unsigned = x.to(gl.uint32, bitcast=True)
        gl.store(unsigned_ptr + offs, (unsigned >> shift).to(gl.int32))

    x = torch.tensor([1.0, -1.0, 2.0, -2.0])
    signed, unsigned = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    kernel[(1,)](x, signed, unsigned, N=4)
    assert signed.argsort().tolist() == x.argsort().tolist()
    assert unsigned.tolist() == [0, 1, 0, 1]


def test_shared_memory_starts_undefined_and_atomics_by_assembly(language):
    jit, gl = language

    def asm(text, *args):
        return gl.inline_asm_elementwise(
            text, "", list(args), dtype=gl.int32, is_pure=False, pack=1
        )

    @jit
    def kernel(list_ptr, ticket_ptr, fresh_ptr):
        words = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        fresh = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        offs = gl.arange(0, 128)
        gl.store(fresh_ptr + offs, fresh.load(None))
        words.store(gl.zeros([128], gl.int32))
        lane = gl.arange(0, 48)
        asm("append", lane * 2, lane * 3, (lane % 2 == 0).to(gl.int32))
        gl.store(ticket_ptr + lane, asm("take", (lane < 8).to(gl.int32)))
        asm("histogram", gl.full([7], 127, gl.int32))
        gl.store(list_ptr + offs, words.load(None))
        gl.store(ticket_ptr + 48, asm("count"))

    words = torch.zeros(128, dtype=torch.int32)
    tickets = torch.zeros(49, dtype=torch.int32)
    fresh = torch.zeros(128)
    kernel[(1,)](words, tickets, fresh)
    assert fresh.isnan().all()
    assert sorted(words[:24].tolist()) == list(range(0, 96, 4))
    assert torch.equal(words[64:88] * 2, words[:24] * 3)
    assert sorted(tickets[:8].tolist()) == list(range(24, 32))
    assert (tickets[8:48] == -1).all()
    assert tickets[48] == 32
    assert words[127] == 7


def test_named_barrier_orders_two_partitions(language):
    jit, gl = language

    def barrier(text):
        gl.inline_asm_elementwise(text, "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1)

    @jit
    def write(word, out_ptr):
        word.store(gl.full([1], 7.0, gl.float32))
        barrier("bar.arrive 8, 256; mov.b32 $0, 0;")

    @jit
    def read(word, out_ptr):
        barrier("bar.sync 8, 256; mov.b32 $0, 0;")
        gl.store(out_ptr + gl.arange(0, 1), word.load(None))

    @jit
    def kernel(out_ptr):
        word = gl.allocate_shared_memory(gl.float32, [1], None)
        gl.warp_specialize([(write, (word, out_ptr)), (read, (word, out_ptr))], [4], [40])

    out = torch.zeros(5)
    for i in range(5):
        kernel[(1,)](out[i:])
    assert out.tolist() == [7.0] * 5


def test_tma_load_counts_bytes_and_pads_with_zeros(language):
    jit, gl = language
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    @jit
    def kernel(x_desc, out_ptr):
        tile = gl.allocate_shared_memory(gl.float32, [4, 4], x_desc.layout)
        bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(bar, count=1)
        mbarrier.expect(bar, x_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(x_desc, [4, 0], bar, tile)
        mbarrier.wait(bar, 0)
        offs = gl.arange(0, 4)
        gl.store(out_ptr + offs[:, None] * 4 + offs[None, :], tile.load(None))

    x, out = torch.arange(24.0).view(6, 4), torch.full((4, 4), float("nan"))
    kernel[(1,)](TensorDescriptor.from_tensor(x, [4, 4], None), out)
    assert torch.equal(out, torch.cat([x[4:], torch.zeros(2, 4)]))


def test_nan_gives_way_to_numbers_in_max_and_min(language):
    jit, gl = language

    @jit
    def kernel(x_ptr, out_ptr):
        row, column = gl.arange(0, 3), gl.arange(0, 4)
        x = gl.load(x_ptr + row[:, None] * 4 + column[None, :])
        gl.store(out_ptr + row, gl.max(x, 1))
        gl.store(out_ptr + 3 + row, gl.min(x, 1))
        gl.store(out_ptr + 6, gl.max(gl.maximum(x, -9.0)))

    nan = float("nan")
    x = torch.tensor([[1.0, nan, 3.0, 2.0], [nan] * 4, [nan, -5.0, nan, -5.0]])
    out = torch.zeros(7)
    kernel[(1,)](x, out)
    expected = torch.tensor([3.0, nan, -5.0, 1.0, nan, -5.0, 3.0])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def run_asm(gl, text, arguments):
    return gl.inline_asm_elementwise(text, "", arguments, dtype=None, is_pure=True, pack=2)


def test_e4m3_becomes_f16_with_the_rounding_of_one_multiplication(language):
    _, gl = language
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(8, 32)
    exact = codes.view(torch.float8_e4m3fn).double()
    pairs = codes.view(torch.int16)
    factors = (torch.arange(8 * 16).view(8, 16) * 0.0321 + 2.0**-12).half()

    def rounded(x):
        return x.to(torch.float16)

    low, high = run_asm(gl, "mov.b32 {a, b}, $2;", [pairs, factors])
    # a register has two pairs and two factors
    words, both = exact.view(8, 8, 2, 2), factors.double().view(8, 8, 2)
    for actual, expected in ((low, words[:, :, 0] * both), (high, words[:, :, 1] * both)):
        torch.testing.assert_close(
            actual, rounded(expected.view(8, 16)), rtol=0, atol=0, equal_nan=True
        )
    even, odd = run_asm(gl, "prmt.b32 w, $2, $2, 0x3120;", [pairs, factors])
    for actual, expected in ((even, exact[:, ::2]), (odd, exact[:, 1::2])):
        torch.testing.assert_close(
            actual, rounded(expected * factors.double()), rtol=0, atol=0, equal_nan=True
        )


SET = "setp.gt.f32 is_above, $1, 0f41000000; mov.b32 $0, 0;"
ASK = "{ .reg .pred p; bar.red.or.pred p, 14, 128, is_above; selp.b32 $0, 1, 0, p; }"


@pytest.mark.parametrize(
    ("values", "expected"), [((8.0,), 0), ((8.0, 8.000001), 1), ((float("nan"), -9.0), 0)]
)
def test_threads_vote_by_a_predicate(language, values, expected):
    jit, gl = language

    @jit
    def kernel(x_ptr, out_ptr):
        run_asm(gl, SET, [gl.load(x_ptr + gl.arange(0, 128))])
        gl.store(out_ptr, run_asm(gl, ASK, []))

    x, out = torch.zeros(128), torch.full((1,), -1, dtype=torch.int32)
    x[40 : 40 + len(values)] = torch.tensor(values)
    kernel[(1,)](x, out)
    assert out.item() == expected


def test_a_vote_without_a_predicate_and_one_of_other_threads_are_refused(language):
    jit, gl = language

    @jit
    def kernel(x_ptr, COUNT: gl.constexpr):
        if COUNT:
            run_asm(gl, SET, [gl.load(x_ptr + gl.arange(0, COUNT))])
        run_asm(gl, ASK, [])

    with pytest.raises(EmulationError, match="is_above is read before it is set"):
        kernel[(1,)](torch.zeros(128), COUNT=0)
    with pytest.raises(EmulationError, match="64 elements for 4 warps"):
        kernel[(1,)](torch.zeros(128), COUNT=64)
    with pytest.raises(EmulationError, match="a vote of others than this partition's 8 warps"):
        kernel[(1,)](torch.zeros(256), COUNT=256, num_warps=8)
