"""Statistics of a tokenizer's latents before quantization."""

from lexel.evaluate.metric import Batch, Context, Metric
from lexel.metrics import MeanState


class Latents(Metric):
    """`quantization_error`, the mean squared distance of latents to their codes, and `latent_norm`, their mean length.

    Both are means over positions, then over images. Continuous latents have no quantization error.
    """

    needs = frozenset({"latents"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.states = {"latent_norm": MeanState()}
        if context.codebook_size is not None:
            self.states = {"quantization_error": MeanState(), **self.states}

    def update(self, batch: Batch) -> None:
        assert batch.latents is not None
        assert batch.quantized is not None
        z = batch.latents.double()
        self.states["latent_norm"].add(z.norm(dim=1).flatten(1).mean(1))
        if "quantization_error" in self.states:
            self.states["quantization_error"].add((batch.quantized.double() - z).square().flatten(1).mean(1))
