"""The objective of a tokenizer's training: the losses that a recipe weighs, and the features they are computed from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lexel.distributed import all_sum, mean_over_processes, processes
from lexel.errors import UsageError
from lexel.losses import LPIPS, Loss, LossInputs, LPIPSLoss, adaptive_weight
from lexel.losses.table import LOSSES, build
from lexel.quantizers.base import weighted_sum
from lexel.runtime import without_weights
from lexel.tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    from lexel.train.recipes import TrainConfig

QUANTIZED = ("latents", "codes")  # features that are the quantizer's argument and result


def image_terms(train: "TrainConfig") -> list[str]:
    """The terms a recipe may weigh beside those of its model, in the order in which they are added up."""
    return [*dict.fromkeys([*LOSSES, *train.losses]), "adversarial"]


class Total(NamedTuple):
    """The losses of a step."""

    terms: dict[str, Tensor]  # each unweighted, and adaptive weights as NAME_weight
    reconstruction: Tensor  # the weighted sum of those of images, against which adversarial weights are balanced
    others: Tensor | None  # the weighted sum of the rest


class Objective(nn.Module):
    """The losses of a recipe whose weight is not 0, by their names in the recipe.

    Its parameters are those of the losses (projectors); frozen networks are not saved.

    Args:
        train: weights of the losses and their options.
        model: the tokenizer to train.
        size: pixels a side of the images.

    Raises:
        UsageError: a loss, an option or the features it asks for do not exist, or weights are not found.
    """

    def __init__(self, train: "TrainConfig", model: TokenizerConfig, size: int) -> None:
        super().__init__()
        self.weights = dict(train.weights)
        weighed = [name for name in image_terms(train) if name != "adversarial" and train.weights.get(name)]
        losses = {name: loss_of(train, name) for name in weighed}
        self.losses = nn.ModuleDict(losses)
        for name, loss in losses.items():
            if loss.colour and model.autoencoder.channels != 3:
                raise UsageError(f"the loss {name} needs images of 3 channels, got {model.autoencoder.channels}")
        self.features = tuple(dict.fromkeys(feature for loss in losses.values() for feature in loss.features))
        self.shapes = feature_shapes(model, size, self.features)
        for loss in losses.values():
            loss.connect({feature: self.shapes[feature] for feature in loss.features})

    def items(self) -> Iterator[tuple[str, Loss]]:
        for name in self.losses:
            yield name, self._loss(name)

    @property
    def lpips(self) -> LPIPS | None:
        """The perceptual distance that is trained on, which validation measures too."""
        return next((loss.distance for _, loss in self.items() if isinstance(loss, LPIPSLoss)), None)

    def forward(self, inputs: LossInputs, encoder: nn.Module) -> Total:
        """The losses of a step.

        Args:
            inputs: images, their reconstructions, and the features that `features` names.
            encoder: the tokenizer's, at whose last weight adaptive losses are balanced; the weight is one for all
                processes, and at most 1e4.
        """
        for feature, tensor in inputs.features.items():
            if torch.is_grad_enabled() and not tensor.requires_grad:
                names = ", ".join(name for name, loss in self.items() if feature in loss.features)
                raise UsageError(
                    f"the loss {names} looks at {feature!r}, where nothing learns in this training "
                    "(init.what = 'decoder' trains the decoder alone); give it features of the decoder or leave it out"
                )
        terms = {name: loss(inputs) for name, loss in self.items()}
        of_images = {name: term for name, term in terms.items() if self._loss(name).of_images}
        reconstruction, others = weighted_sum(of_images, self.weights), None
        for name in [name for name in terms if name not in of_images]:
            weight = torch.full((), self.weights[name], device=reconstruction.device)
            if self._loss(name).adaptive:
                ratio = adaptive_weight(reconstruction, terms[name], last_weight(encoder), "global")
                weight = terms[f"{name}_weight"] = weight * mean_over_processes(ratio)
            others = weight * terms[name] + (0 if others is None else others)
        return Total(terms, reconstruction, others)

    def _loss(self, name: str) -> Loss:
        loss = self.losses[name]
        assert isinstance(loss, Loss)
        return loss

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Makes the gradients of the losses' own parameters the means over processes; every process must call."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if processes() == 1 or not gradients:
            return
        together = all_sum(torch.cat([gradient.flatten() for gradient in gradients])) / processes()
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def loss_of(train: "TrainConfig", name: str) -> Loss:
    """The loss of a name in `train.weights`, with the options of `train.losses` if it has a section there."""
    options = dict(train.losses.get(name, {}))
    kind = options.pop("kind", name)
    if name == "lpips" and name not in train.losses:
        options = {"network": train.lpips}
    return build(kind, options)


def feature_shapes(model: TokenizerConfig, size: int, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of features, without the batch: (C, h, w) for maps. No weights are made.

    Raises:
        UsageError: the tokenizer has no such features.
    """
    if not names:
        return {}
    with without_weights(), torch.no_grad():
        tokenizer = Tokenizer(model)
        if tokenizer.autoencoder.shares is not None:
            raise UsageError(f"features of a {model.autoencoder.kind} autoencoder, of several grids, cannot be aligned")
        images = torch.empty(1, model.autoencoder.channels, size, size)
        grid = tokenizer.grid(size, size)
        z_q = torch.empty(1, tokenizer.quantizer.codebook_dim, *grid)
        with gathered(tokenizer, [name for name in names if name not in QUANTIZED], grid) as found:
            z = tokenizer.to_codes(tokenizer.encoder(images))
            tokenizer.decode_codes(z_q)
        found |= {"latents": z, "codes": z_q}
        idle = [name for name in names if name not in found]
        if idle:
            raise UsageError(f"the part {idle[0]!r} of the tokenizer has no result in a forward pass; choose another")
    return {name: tuple(found[name].shape[1:]) for name in names}


@contextmanager
def gathered(tokenizer: Tokenizer, names: Sequence[str], grid: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """Features of the forward pass inside, by name: (B, C, h, w) where they lie on the grid of latents.

    Args:
        tokenizer: to look into.
        names: "latents" before quantization, "codes" after it, or the path of a part such as "encoder.middle".
        grid: of the latents; parts that give a sequence of as many tokens (B, N, C) give a map of it.

    Raises:
        UsageError: there is no such part.
    """
    found: dict[str, Tensor] = {}
    handles = []

    def of_quantizer(_: nn.Module, arguments: tuple[Tensor, ...], result: Any) -> None:
        found.update({"latents": arguments[0], "codes": result.z_q})

    def of_part(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            if not isinstance(result, Tensor):
                raise UsageError(f"the part {name!r} gives no tensor to align; choose another")
            found[name] = as_map(result, grid)

        return hook

    try:
        if set(names) & set(QUANTIZED):
            handles.append(tokenizer.quantizer.register_forward_hook(of_quantizer))
        for name in names:
            if name not in QUANTIZED:
                handles.append(part_of(tokenizer, name).register_forward_hook(of_part(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def as_map(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A sequence of tokens (B, N, C) as a map (B, C, h, w) where N = h w, else as (B, C, N); maps as they are."""
    if features.dim() != 3:
        return features
    places = features.transpose(1, 2)
    return places.unflatten(2, grid) if len(grid) == 2 and places.shape[2] == grid[0] * grid[1] else places


def part_of(tokenizer: Tokenizer, name: str) -> nn.Module:
    """A part of the encoder or decoder by its path.

    Raises:
        UsageError: there is none; names those to choose from.
    """
    parts = {
        path: part
        for path, part in tokenizer.named_modules()
        if path.split(".")[0] in ("encoder", "decoder") and not isinstance(part, nn.ModuleList)
    }
    if name not in parts:
        choices = [path for path in parts if path.count(".") <= 1 or path.split(".")[-1].isdecimal()]
        choices = [path for path in choices if path.count(".") <= 2]
        raise UsageError(
            f"the tokenizer has no features {name!r}; choose latents, codes or a part: {', '.join(choices)}"
        )
    return parts[name]


def last_weight(module: nn.Module) -> nn.Parameter:
    """The last matrix or kernel of a module that learns, where the balance of losses is taken."""
    learning = [weight for weight in module.parameters() if weight.requires_grad and weight.dim() > 1]
    if not learning:
        raise UsageError("an adaptive weight is balanced at the encoder's last weight, and the encoder does not learn")
    return learning[-1]
