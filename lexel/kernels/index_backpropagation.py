"""Index backpropagation (https://arxiv.org/abs/2412.02692), the plain dense oracle (a first version)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_backpropagation(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    entropy_temperature: float = 0.01,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Quantizes rows z (N, D) by codebook (K, D) with the straight-through one-hot over all codes.

    Returns z_q (N, D), indices int64 (N,), and the terms `quantization`, `commitment`, `codebook`,
    `entropy_sample`, `entropy_batch`.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.to(dtype), codebook.to(dtype)
        logits = z @ codebook.T
        p = (logits / temperature).softmax(1)
        indices = logits.argmax(1)
        hard = F.one_hot(indices, len(codebook)).to(dtype)
        z_q = (hard + (p - p.detach())) @ codebook
        chosen = codebook[indices]
        scaled = logits / entropy_temperature
        log_q = scaled.log_softmax(1)
        q = log_q.exp()
        mean_q = q.mean(0)
        terms = {
            "quantization": (z_q - z).square().mean(),
            "commitment": (chosen.detach() - z).square().mean(),
            "codebook": (chosen - z.detach()).square().mean(),
            "entropy_sample": -(q * log_q).sum(1).mean(),
            "entropy_batch": -(mean_q * (mean_q + 1e-5).log()).sum(),
        }
    return z_q, indices, terms
