"""Dry runs: the resolved recipe, its parameters, and the memory that training may take."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lexel import config
from lexel.errors import UsageError
from lexel.losses import Loss, LossInputs
from lexel.memory import UNQUESTIONED, FusedAttention, available_bytes, decodable, encoded, gib
from lexel.runtime import Runtime, without_weights
from lexel.shapes import Shapes
from lexel.tokenizer import Tokenizer
from lexel.train.objective import Objective, feature_shapes
from lexel.train.recipes import TokenizerRecipe, outline

if TYPE_CHECKING:
    from lexel.train.generator_recipe import GeneratorRecipe

UNQUESTIONED_WEIGHTS = 2**24  # fewer are not worth an estimate
LEARNED = 16  # bytes a parameter: weight, gradient and Adam's two moments, each float32


class Plan(NamedTuple):
    """The output of `lexel train --dry-run`."""

    recipe: str  # resolved, as TOML
    parameters: dict[str, int]  # of each network
    memory: dict[str, int]  # bytes on one device, by purpose
    images: int  # that pass through a device at a time: its share of a batch, or of an accumulated part

    def __str__(self) -> str:
        rows = [f"{name:<24}{count:>16,} parameters" for name, count in self.parameters.items()]
        rows += [f"{name:<24}{size / 2**30:>16.2f} GiB" for name, size in self.memory.items()]
        total = sum(self.memory.values()) / 2**30
        if "kept for backward" not in self.memory:
            rows += [f"{'kept for backward':<24}{'not estimated':>20}"]
        rows += [f"{'memory, estimated':<24}{total:>16.2f} GiB on a device that takes {self.images} images at a time"]
        return f"{self.recipe}\n" + "\n".join(rows)


def plan(recipe: "TokenizerRecipe | GeneratorRecipe", processes: int = 1) -> Plan:
    """The plan for one of `processes` devices, made on the meta device: no weights, no data.

    What a forward pass keeps for the backward pass is counted exactly, where it can be run without values; temporary
    results of the backward pass and the allocator's reserve are not, so that the sum is low by a tenth or two.
    """
    if isinstance(recipe, TokenizerRecipe):
        return _tokenizer(recipe, processes)
    return _generator(recipe, processes)


def check_memory(recipe: "TokenizerRecipe | GeneratorRecipe", where: Runtime, processes: int = 1) -> None:
    """Refuses a training that cannot fit in memory, before any of it is allocated.

    Weights, optimizers and what a forward pass keeps are counted, attention as fused kernels have it: a lower bound.

    Raises:
        UsageError: it is more than the device has.
    """
    there = available_bytes(where.device)
    weights = sum(count_parameters(networks_of(recipe)).values())
    if there is None or (weights < UNQUESTIONED_WEIGHTS and _pixels(recipe, processes) < UNQUESTIONED):
        return
    try:
        with FusedAttention():
            needed = sum(plan(recipe, processes).memory.values())
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        needed = weights * 4  # a network or a loss that looks at values tells no more without them
    if needed > there:
        raise UsageError(
            f"out of memory: this training needs at least {gib(needed)} GiB, {where.device} has {gib(there)} GiB; "
            "lower train.batch_size, the size of the images or of the network, or raise train.accumulation"
        )


def _pixels(recipe: "TokenizerRecipe | GeneratorRecipe", processes: int) -> int:
    """Pixels of the images, or tokens, that pass through a device at a time."""
    share = recipe.train.batch_size // processes // recipe.train.accumulation
    return share * (recipe.data.size**2 if isinstance(recipe, TokenizerRecipe) else recipe.generator.tokens)


def networks_of(recipe: "TokenizerRecipe | GeneratorRecipe") -> dict[str, nn.Module]:
    """The networks of a training, on the meta device: "tokenizer" or "generator", "discriminator", losses by name."""
    networks: dict[str, nn.Module] = {}
    with without_weights():
        if not isinstance(recipe, TokenizerRecipe):
            return {"generator": recipe.network()}
        networks["tokenizer"] = outline(recipe.model)
        if recipe.train.discriminator is not None and recipe.train.weights.get("adversarial"):
            networks["discriminator"] = recipe.train.discriminator.build()
        losses = Objective(recipe.train, recipe.model, recipe.data.size).items()
        return networks | {name: loss for name, loss in losses if [*loss.parameters(), *loss.buffers()]}


def count_parameters(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """The parameters of the networks of a training, by their names in a plan."""
    counts: dict[str, int] = {}
    for name, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        if isinstance(network, Tokenizer):
            quantizer = sum(parameter.numel() for parameter in network.quantizer.parameters())
            counts |= {"encoder and decoder": count - quantizer, "quantizer": quantizer}
        else:
            counts |= {name: count} if count else {}
            fixed = sum(buffer.numel() for buffer in network.buffers()) if isinstance(network, Loss) else 0
            counts |= {f"{name} (frozen)": fixed} if fixed else {}
    return counts


def _tokenizer(recipe: TokenizerRecipe, processes: int) -> Plan:
    recipe = recipe.resolved()
    train = recipe.train
    batch = max(1, train.batch_size // processes // train.accumulation)
    networks = networks_of(recipe)
    tokenizer = networks["tokenizer"]
    assert isinstance(tokenizer, Tokenizer)
    parameters = count_parameters(networks)
    with without_weights():
        images = torch.empty(batch, recipe.data.channels, recipe.data.size, recipe.data.size)
        z, kept = kept_for_backward(tokenizer, partial(encoded, tokenizer), images)
        kept += kept_for_backward(tokenizer, tokenizer.decoder, decodable(tokenizer, z))[1]
        if "discriminator" in networks:  # real and made, while the tokenizer's graph waits
            kept += 2 * kept_for_backward(networks["discriminator"], networks["discriminator"], images)[1]
        losses = {name: loss for name, loss in networks.items() if isinstance(loss, Loss)}
        wanted = tuple(feature for loss in losses.values() for feature in loss.features)
        shapes = feature_shapes(recipe.model, recipe.data.size, wanted)
        features = {name: torch.empty(batch, *shape).requires_grad_(True) for name, shape in shapes.items()}
        for loss in losses.values():
            inputs = LossInputs(images, images.clone().requires_grad_(True), features)
            kept += kept_for_backward(loss, loss, inputs)[1]
    learned = sum(parameter.numel() for parameter in tokenizer.parameters())
    frozen = sum(count for name, count in parameters.items() if name.endswith("(frozen)"))
    memory = {
        "weights and optimizers": (sum(parameters.values()) - frozen) * LEARNED,
        "average of the weights": learned * 4,
        "frozen networks": frozen * 4,
        "kept for backward": kept // (1 if train.precision == "float32" else 2),
    }
    return Plan(config.dump(recipe), parameters, {name: size for name, size in memory.items() if size}, batch)


def _generator(recipe: "GeneratorRecipe", processes: int) -> Plan:
    train = recipe.train
    batch = max(1, train.batch_size // processes // train.accumulation)
    with without_weights():
        network = recipe.network()
    kept = 0
    if not network.needs_tokenizer:  # else what it sees are vectors of codes, which are not at hand
        with without_weights():
            condition = network.condition.example(batch)
            try:
                _, kept = kept_for_backward(
                    network, lambda tokens: network.losses(tokens, condition), network.nothing(batch)
                )
            except RuntimeError as error:
                if "meta" not in str(error):  # a loss that looks at values cannot be run without them
                    raise
    count = sum(parameter.numel() for parameter in network.parameters())
    shares = processes if train.fsdp else 1
    memory = {
        "weights and optimizers": count * LEARNED // shares,
        "average of the weights": 0 if train.average_decay is None else count * 4,
        "kept for backward": kept // (1 if train.precision == "float32" else 2),
    }
    if train.checkpointing:  # the input of each block, and one block at a time
        memory["kept for backward"] //= len(network.layers()) // 2 or 1
    return Plan(config.dump(recipe), {"generator": count}, {name: size for name, size in memory.items() if size}, batch)


def kept_for_backward(module: nn.Module, call: Callable[[Any], Any], inputs: Any) -> tuple[Any, int]:
    """The result of a call on the meta device, and the bytes that autograd keeps for its backward pass."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # while a tensor lives, no other storage gets its address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with Shapes(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call(inputs)
    return result, sum(kept.values())
