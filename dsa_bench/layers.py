"""The whole layers as a library: loaded from a checkpoint, computed by what is fastest here.

from dsa_bench.layers import load_layer, tune

layer = load_layer("model-00001-of-000163.safetensors", layer=0, precision="fp8")
tune(layer)                                     # where the masked form stops paying
outputs = layer.prefill(hidden, cache)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsa_bench import measure, registry
from dsa_bench.kernels.latent_attention import LayerOutputs
from dsa_bench.kernels.layer import DeepSeekSparseAttention
from dsa_bench.kernels.layer_cache import LayerCache
from dsa_bench.kernels.layer_checkpoint import load_weights
from dsa_bench.kernels.layer_weights import LayerWeights
from dsa_bench.machine import detect
from dsa_bench.operator import Implementation
from dsa_bench.preset import PRESETS, Preset
from dsa_bench.record import Case
from dsa_bench.stats import median

TUNE_LENGTHS = (2048, 3072, 4096, 6144, 8192, 12288, 16384)
LAYER_OPERATORS = (("dsa_layer", "prefill"), ("masked_layer", "prefill"), ("dsa_layer", "decode"))
NOMINAL_LENGTH = 8192
"""Implementations are chosen for a prompt of this length."""


def load_layer(
    path: str | Path,
    *,
    layer: int | None = None,
    preset: Preset = PRESETS["v3.2"],
    topk: int = 2048,
    precision: str = "bf16",
    device: str = "auto",
    rank: int = 0,
    num_ranks: int = 1,
) -> DeepSeekSparseAttention:
    """A sparse layer with weights of a published checkpoint; arguments as of `load_weights`."""
    machine = detect(device)
    weights = load_weights(
        path,
        preset,
        layer=layer,
        precision=precision,
        device=machine.device,
        rank=rank,
        num_ranks=num_ranks,
    )
    return make_layer(weights, topk=topk, precision=precision)


def make_layer(
    weights: LayerWeights, *, topk: int = 2048, precision: str = "bf16"
) -> DeepSeekSparseAttention:
    """A sparse layer on the device of its weights."""
    stages = choose_stages(weights, topk, precision, weights.q_norm.device.type)
    return DeepSeekSparseAttention(weights, topk=topk, stages=stages)


def choose_stages(
    weights: LayerWeights, topk: int, precision: str, device: str
) -> dict[str, Implementation]:
    """What `auto` means on this machine, for every stage of prefill and decode."""
    machine, preset = detect(device), weights.preset
    chosen: dict[str, Implementation] = {}
    for op, phase in LAYER_OPERATORS:
        case = Case(
            op=op,
            impl="auto",
            phase=phase,
            seq_len_kv=max(NOMINAL_LENGTH, topk),
            seq_len_q=NOMINAL_LENGTH // 2 if phase == "prefill" else 1,
            topk=topk,
            precision=precision,
            num_heads=weights.num_heads,
        )
        names = registry.choose(op, case, preset, machine)
        assert not isinstance(names, str)
        chosen |= {stage: registry.implementation(stage, name) for stage, name in names.items()}
    return chosen


def tune(
    layer: DeepSeekSparseAttention, lengths: Sequence[int] = TUNE_LENGTHS, *, chunk: int = 4096
) -> dict[int, tuple[float, float]]:
    """Time both forms on this machine, and let the layer switch where the sparse one is faster.

    The last `chunk` tokens of a prompt of each length are timed. `mha_up_to` becomes the last
    length at which the masked form, winning at all shorter ones, wins; no later ones are tried.

    Returns:
        length -> (seconds of the masked form, seconds of the sparse form).
    """
    times: dict[int, tuple[float, float]] = {}
    mha_up_to = 0
    for length in sorted(lengths):
        prompt = _Prompt.make(layer, length, min(chunk, length))
        masked, sparse = (prompt.seconds(layer, form) for form in ("mha", "mqa"))
        times[length] = (masked, sparse)
        if sparse < masked:
            break
        mha_up_to = length
    layer.form, layer.mha_up_to = "auto", mha_up_to
    return times


@dataclass(frozen=True)
class _Prompt:
    """Random hidden states whose first tokens are in the cache."""

    hidden: torch.Tensor
    cache: LayerCache
    start: int

    @classmethod
    def make(cls, layer: DeepSeekSparseAttention, length: int, chunk: int) -> "_Prompt":
        weights = layer.weights
        like, preset = weights.q_norm, weights.preset
        generator = torch.Generator(device=like.device).manual_seed(0)
        hidden = torch.randn(length, preset.hidden_size, generator=generator, device=like.device)
        hidden = hidden.to(like.dtype)
        names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
        precision = "fp8" if layer.is_quantized else names[like.dtype]
        cache = LayerCache.allocate(preset, 1, length, precision, like.device)
        start = length - chunk
        for begin in range(0, start, chunk):
            layer.prefill(hidden[begin : min(begin + chunk, start)], cache, start=begin)
        return cls(hidden[start:], cache, start)

    def seconds(self, layer: DeepSeekSparseAttention, form: str) -> float:
        layer.form = form

        def run(inputs: _Prompt, /) -> LayerOutputs:
            return layer.prefill(inputs.hidden, inputs.cache, start=inputs.start)

        machine = detect(self.hidden.device.type)
        run(self)
        sampler = measure.open_sampler(
            run,
            [self],
            mode=measure.default_mode("prefill", machine),
            effort=measure.EFFORTS["quick"],
            machine=machine,
        )
        sampler.visit(0)
        return median(sampler.timing.seconds)
