"""Soft vector quantization with an annealed temperature (appendix B of https://arxiv.org/abs/2412.02692)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.kernels.inputs import OnRows, differentiable_once
from lexel.quantizers import bounds
from lexel.quantizers.annealed import Annealed
from lexel.quantizers.base import Quantized, as_grid, as_vectors, choose, full_precision

TILE = 4096  # codes in hand at a time
NAME = "the soft assignment of Soft VQ"


class Soft(Annealed):
    """In training z_q is the average of all codes under softmax(logits / tau); in evaluation the best code.

    The average is exact and differentiable in latents and codes, and so needs no loss terms; tau falls along half a
    cosine as `anneal` is told. The paper shows that it fails: the average pulls codes together, and what is
    trained is not what is used. Its text has lost the end points of tau, so they are parameters here, and the
    defaults are a guess; it says nothing on the start of the codes, which is N(0, 1) as in IBQ.

    `gap`, the mean squared distance between the average and the best code, is reported and has weight 0.

        soft = Soft(codebook_size=1024, codebook_dim=32, tau_start=0.9, tau_end=0.01)
        soft.anneal(step / steps)

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        tau_start: temperature at progress 0.
        tau_end: temperature at progress 1, above 0.
        similarity: what the logits are, "dot" or "l2" (the negative squared distance).
        hard_from: from this progress on z_q is the best code in training too, with the average's gradient; 1 is
            never before the last step.
        restart_below: codes that fewer latents a batch choose, on average, start again at latents; 0 is never.
    """

    LOSS_WEIGHTS = {"gap": 0.0}

    exact_in_training = False

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        tau_start: float = 0.9,
        tau_end: float = 1e-6,
        similarity: Literal["dot", "l2"] = "dot",
        hard_from: float = 1.0,
        restart_below: float = 0.0,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, tau_start, tau_end)
        self.hard_from = bounds.number("hard_from", hard_from, 0, 1)
        self.similarity = choose("similarity", similarity, ("dot", "l2"))
        self.weight = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.follow_use(restart_below)

    @full_precision
    def forward(self, z: Tensor) -> Quantized:
        if not self.training:
            indices = self.assign(z)
            z_q = self.indices_to_codes(indices).to(z.dtype)
            return Quantized(z_q, indices, {"gap": z_q.new_zeros(())})
        self.restart_dead(z)
        keys: Tensor = self.weight
        bias = self.weight.new_zeros(self.codebook_size)
        if self.similarity == "l2":  # -|z - e|^2 but for |z|^2, which the softmax does not see
            keys, bias = 2 * self.weight, -self.weight.square().sum(1)
        average, rows = soft_assign(as_vectors(z), keys, bias, self.weight, self.temperature)
        self.count_chosen(z, rows)
        soft, indices = as_grid(average, z), rows.view(z.shape[0], *z.shape[2:])
        hard = self.indices_to_codes(indices).detach()
        value = torch.where(self.progress >= self.hard_from, hard, soft.detach())
        return Quantized(value + (soft - soft.detach()), indices, {"gap": F.mse_loss(soft.detach(), hard)})


def soft_assign(
    z: Tensor, keys: Tensor, bias: Tensor, values: Tensor, temperature: Tensor, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """The average of `values` (K, D) under softmax((z @ keys.T + bias) / temperature), tile by tile over K.

    Returns the averages (N, D), differentiable in z (N, E), keys (K, E), bias (K,) and values, and the indices
    int64 (N,) of the largest logits. No tensor of N x K exists, forward or backward: the backward pass makes each
    tile's probabilities again from the saved log-normaliser.
    """
    dtype = z.dtype
    average, indices, _ = _SoftAssign.apply(
        z, keys.to(dtype), bias.to(dtype), values.to(dtype), temperature.to(dtype), tile
    )
    return average, indices


class _SoftAssign(OnRows):
    NAME = NAME

    @staticmethod
    def forward(
        z: Tensor, keys: Tensor, bias: Tensor, values: Tensor, temperature: Tensor, tile: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        highest = z.new_full((len(z), 1), -torch.inf)  # the largest logit so far,
        total = torch.zeros_like(highest)  # sum of exp(logit - highest),
        weighted = z.new_zeros(len(z), values.shape[1])  # and sum of exp(logit - highest) * value
        indices = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        for start in range(0, len(keys), tile):
            part = slice(start, start + tile)
            logits = torch.addmm(bias[part], z, keys[part].T) / temperature
            top, index = logits.max(1, keepdim=True)
            indices = torch.where(top > highest, index + start, indices[:, None])[:, 0]
            higher = torch.maximum(top, highest)
            shrink = (highest - higher).exp()
            p = (logits - higher).exp_()
            total = total * shrink + p.sum(1, keepdim=True)
            weighted = weighted * shrink + p @ values[part]
            highest = higher
        return weighted / total, indices, highest + total.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.tile = inputs
        average, indices, normaliser = output
        ctx.save_for_backward(*tensors, average, normaliser)
        ctx.mark_non_differentiable(indices, normaliser)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        z, keys, bias, values, temperature, average, normaliser = ctx.saved_tensors
        with torch.no_grad():
            centre = (gradient * average).sum(1, keepdim=True)
            z_grad = torch.zeros_like(z)
            keys_grad, bias_grad, values_grad = torch.empty_like(keys), torch.empty_like(bias), torch.empty_like(values)
            for start in range(0, len(keys), ctx.tile):
                part = slice(start, start + ctx.tile)
                p = (torch.addmm(bias[part], z, keys[part].T) / temperature - normaliser).exp_()
                values_grad[part] = p.T @ gradient
                slope = p.mul_((gradient @ values[part].T).sub_(centre)).div_(temperature)  # d loss / d logits
                z_grad.addmm_(slope, keys[part])
                keys_grad[part] = slope.T @ z
                bias_grad[part] = slope.sum(0)
        gradients = (z_grad, keys_grad, bias_grad, values_grad)
        return *differentiable_once(NAME, gradients, (z, keys, bias, values, gradient)), None, None
