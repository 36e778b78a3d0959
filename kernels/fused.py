"""The op set of kernels.eager in Triton, with the same names and signatures."""

from kernels.attention import causal_attention, rotary_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.eager import attention_probs  # the evaluation reads whole probability matrices, which no kernel makes
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm", "attention_probs", "causal_attention", "linear_cross_entropy",
    "rms_norm", "rotary", "rotary_attention", "swiglu",
]  # fmt: skip
