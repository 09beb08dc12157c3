"""Index Backpropagation Quantization (https://arxiv.org/abs/2412.02692)."""

from collections.abc import Mapping
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import UsageError
from lexel.kernels import (
    PRODUCTS,
    SIMILARITIES,
    Products,
    Similarity,
    has_half_products,
    index_backpropagation,
    sharded,
)
from lexel.quantizers import bounds
from lexel.quantizers.base import Advice, Quantized, Quantizer, Table, as_grid, as_vectors, choose, full_precision
from lexel.quantizers.statistics import Statistics, check_statistics, groups


class IBQ(Quantizer):
    """Puts the straight-through estimator on the one-hot over all codes, so that every code learns.

    The latents learn through the softmax only: their gradient is the covariance of the codes under the softmax times
    the decoder's gradient, and it vanishes where the softmax is saturated.

        quantizer = IBQ(codebook_size=16384, codebook_dim=256)
        z_q, indices, losses = quantizer(torch.randn(2, 256, 16, 16))
        quantizer.loss(losses).backward()

    Args:
        codebook_size: number of codes, K.
        codebook_dim: length of a code, D.
        temperature: of the softmax that carries the gradient, above 0.
        entropy_temperature: of the softmax whose entropies are loss terms, above 0.
        similarity: what the logits are: "dot" (published), "l2" (minus the squared distance) or "cosine" (of the angle;
            use a temperature well below 1 with it).
        identity: adds this share of the output's gradient to the latents as it is, as plain straight-through does;
            0 (published) to 1.
        entropy: False leaves out both entropy terms and their cost.
        rows: how many latents the backward pass takes at a time; fewer save memory and cost time (docs/performance.md).
        statistics: the images over which a batch entropy is taken. "process": the batch of each process, as in the
            released code, where that is 4 images; a number (4 for the published runs): that many, with the same result
            on any number of processes; "global": the batches of all processes.
        normalize: what is brought to unit length before anything else: "latents" (in the loss terms too), "codes"
            (`codebook` and z_q are unit vectors), "both" (spherical IBQ, Emu3.5's `l2_normalize`), or nothing.
        restart_below: codes that fewer latents a batch choose, on average, start again at latents; 0 is never.
        products: the precision of the products of the backward pass; "auto" is "bf16" under autocast where the device
            has such products, as published under mixed precision, else "float32". Indices and losses are the same.
    """

    LOSS_WEIGHTS = {
        "quantization": 1.0,
        "commitment": 1.0,
        "codebook": 0.25,
        "entropy_sample": 0.05,
        "entropy_batch": -0.05,
    }

    can_be_sharded = True

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        temperature: float = 1.0,
        entropy_temperature: float = 0.01,
        similarity: Similarity = "dot",
        identity: float = 0.0,
        entropy: bool = True,
        rows: int | None = None,
        statistics: Statistics = "process",
        normalize: Literal["latents", "codes", "both"] | None = None,
        restart_below: float = 0.0,
        products: Products | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.temperature = bounds.temperature("temperature", temperature)
        self.entropy_temperature = bounds.temperature("entropy_temperature", entropy_temperature)
        self.similarity = choose("similarity", similarity, SIMILARITIES)
        self.identity = bounds.number("identity", identity, 0, 1)
        self.entropy = entropy
        self.rows = None if rows is None else bounds.integer("rows", rows, 1, 2**31)
        self.statistics = check_statistics(statistics)
        if normalize is not None:
            choose("normalize", normalize, ("latents", "codes", "both"))
        self.products = choose("products", products, ("auto", *PRODUCTS))
        self.normalize_latents = normalize in ("latents", "both")
        self.normalize_codes = normalize in ("codes", "both")
        # Unit variance matters: the encoder's gradient is the covariance of the codes times the decoder's gradient.
        self.weight = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.follow_use(restart_below)

    @property
    def codebook(self) -> Tensor:
        return F.normalize(self.weight, dim=1) if self.normalize_codes else self.weight

    def as_compared(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) if self.normalize_latents else z

    @torch.no_grad()
    @full_precision
    def assign(self, z: Tensor) -> Tensor:
        return super().assign(self.as_compared(z))

    def bake(self) -> Quantizer:
        if not self.normalize_latents or self.similarity == "dot":
            return super().bake()  # a dot product chooses the same code at any length of a latent
        if self.normalize_codes or self.similarity == "cosine":
            return Table.of(self.codebook, "cosine")
        raise UsageError(
            "IBQ with normalised latents, other codes and similarity 'l2' has no table to search: "
            "no search over unnormalised latents gives its indices"
        )

    def forward(self, z: Tensor) -> Quantized:
        products = self.products
        if products == "auto":
            half = torch.is_autocast_enabled(z.device.type) and has_half_products(z.device) and not self.sharded
            products = "bf16" if half else "float32"
        return cast(Quantized, self._quantize(z, products))

    @full_precision
    def _quantize(self, z: Tensor, products: Products) -> Quantized:
        self.restart_dead(z)
        vectors = as_vectors(self.as_compared(z))
        parts, together = groups(self.statistics, z.shape[0], self.training and self.entropy)
        if self.sharded and products == "bf16":
            raise UsageError("products = 'bf16' needs the whole codebook in each process; use 'float32' or 'auto'")
        own = partial(index_backpropagation, products=products)
        backpropagation = sharded.index_backpropagation if self.sharded else own
        z_q, indices, losses = backpropagation(
            vectors,
            self.codebook,
            temperature=self.temperature,
            entropy_temperature=self.entropy_temperature,
            similarity=self.similarity,
            entropy=self.entropy,
            rows=self.rows,
            entropy_parts=parts,
            entropy_processes=together,
        )
        self.count_chosen(z, indices)
        if self.identity:
            z_q = z_q + self.identity * (vectors - vectors.detach())
        return Quantized(as_grid(z_q, z), indices.view(z.shape[0], *z.shape[2:]), losses)

    def dead_codes(self, seen: Mapping[str, float]) -> Advice:
        if seen.get("gradient_ratio", 1.0) < 0.01:
            return Advice(
                "the encoder gets almost no gradient: the codes have a small variance, or the softmax is saturated",
                "keep the codes' unit-variance start; raise lr or lower codebook_dim",
            )
        return Advice(
            "too little pressure to spread over the codes, or too few steps so far",
            "train longer, raise the pull of entropy_batch (a more negative weight), or use a larger batch",
        )
