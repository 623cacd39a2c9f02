"""Model dimensions by name: what the axis `--preset` selects."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Dimensions of one model's attention, per layer.

    Source: DeepSeek-V3.2-Exp, inference/config_671B_v3.2.json and inference/model.py.
    """

    name: str
    num_layers: int = 61
    hidden_size: int = 7168
    q_lora_rank: int = 1536
    """Width of the query latent c^Q, from which main and index queries are made."""
    num_heads: int = 128
    """Query heads of the core attention; the sweep's axis `--heads` overrides it."""
    head_dim_nope: int = 128
    """Width of the part of a query without rotation, in the MHA form."""
    head_dim_rope: int = 64
    head_dim_v_mha: int = 128
    """Value width of a head in the MHA form (dense prefill)."""
    head_dim_v: int = 512
    """Value width in the MQA form: the latent that all heads share."""
    index_heads: int = 64
    index_dim: int = 128
    page_size: int = 64
    norm_eps: float = 1e-6
    """Of the RMS norms and of the layer norm of index keys."""
    rope_theta: float = 10000.0
    rope_original_len: int = 4096
    """Positions that the rotation was trained for before YaRN stretched it."""
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_factor: float = 40.0
    """YaRN factor; it enters the softmax scale as mscale = 0.1 ln(factor) + 1."""

    @property
    def head_dim_qk(self) -> int:
        """Query and key width of the MQA form (576)."""
        return self.head_dim_v + self.head_dim_rope

    @property
    def head_dim_qk_mha(self) -> int:
        """Query and key width of the MHA form (192)."""
        return self.head_dim_nope + self.head_dim_rope

    @property
    def sm_scale(self) -> float:
        """192^-1/2 · mscale², the same in the MHA and MQA form (0.1352338 for V3.2)."""
        mscale = 0.1 * math.log(self.rope_factor) + 1.0
        return float(self.head_dim_qk_mha**-0.5 * mscale**2)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(name="v3.2"),
        # the same widths of a head with an eighth of the heads, for a CPU
        Preset(name="v3.2-cpu", hidden_size=1024, q_lora_rank=256, num_heads=16, index_heads=8),
    )
}
