"""Fine-tuning: starting from the weights of another model, all of which learn or only a part."""

import warnings
from typing import Any

from lexel.autoencoders import TiTok
from lexel.checkpoint import load_strict
from lexel.errors import UsageError
from lexel.generators import Generator, NetworkConfig
from lexel.loading import load_generator, load_tokenizer
from lexel.tokenizer import Tokenizer
from lexel.train.recipes import InitConfig


def initialise(tokenizer: Tokenizer, init: InitConfig, initial: Tokenizer | None = None, load: bool = True) -> None:
    """Starts a tokenizer from another one.

    `what` = "all" takes every weight. "decoder" takes every weight and lets only the decoder (with the 1x1 convolution
    before it) learn, so that indices keep their meaning. "codebook" takes the encoder and the decoder and starts with
    a new quantizer, which may be of another kind, size or dimension; the 1x1 convolutions are taken where the dimension
    is the same. "proxy" takes nothing but the tokenizer whose codes TiTok's decoder learns in its first stage, which
    must be there for the whole training, resumed or not.

    Args:
        tokenizer: changed in place.
        init: source and extent.
        initial: the source, if it was loaded already.
        load: False where a checkpoint brings the weights, so that only the choice of what learns is made.

    Raises:
        UsageError: the source is of another architecture.
    """
    if init.what == "proxy":
        proxy = initial if initial is not None else load_tokenizer(init.source)
        predict_codes_of(tokenizer, proxy, init.source)
        return
    if load:
        source: Tokenizer = initial if initial is not None else load_tokenizer(init.source)
        ours, theirs = tokenizer.config, source.config
        if init.what != "codebook" and ours != theirs:
            part = "autoencoder" if ours.autoencoder != theirs.autoencoder else "quantizer"
            raise UsageError(
                f"init.source {init.source} has another {part} than the recipe's model: "
                f"{getattr(theirs, part)!r}; make model.{part} the same, or take only the rest (init.what = 'codebook')"
            )
        if ours.autoencoder != theirs.autoencoder:
            raise UsageError(
                f"init.source {init.source} has another autoencoder than the recipe's model: {theirs.autoencoder!r}"
            )
        tensors = source.state_dict()
        if init.what == "codebook":
            fresh = ["quantizer."]
            if (
                tokenizer.quantizer.codebook_dim != source.quantizer.codebook_dim
                or ours.projections != theirs.projections
            ):
                fresh += ["to_codes.", "from_codes."]
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(fresh))}
            own = tokenizer.state_dict().items()
            tensors |= {name: tensor for name, tensor in own if name.startswith(tuple(fresh))}
        load_strict(tokenizer, tensors, init.source)
    if init.what == "decoder":
        for frozen_part in (tokenizer.encoder, tokenizer.to_codes, tokenizer.quantizer):
            frozen_part.requires_grad_(False)


def predict_codes_of(tokenizer: Tokenizer, proxy: Tokenizer, source: str) -> None:
    """Prepares a TiTok tokenizer's first stage of training: its decoder predicts the codes of `proxy`."""
    network = tokenizer.autoencoder
    if not isinstance(network, TiTok):
        raise UsageError(f"init.what = 'proxy' is for titok autoencoders, got {tokenizer.config.autoencoder.kind}")
    wanted = network.config.proxy and network.config.proxy.pixels
    if proxy.config.autoencoder != wanted or proxy.config.projections:
        raise UsageError(
            f"init.source {source} is not the tokenizer of autoencoder.proxy.pixels: that has the autoencoder "
            f"{wanted!r} and projections = false, got {proxy.config.autoencoder!r} and projections = "
            f"{str(proxy.config.projections).lower()}"
        )
    proxy.eval().requires_grad_(False)
    network.predict_codes_of(
        lambda images: proxy.to(images.device).encode(images), proxy.quantizer.codebook, proxy.decoder
    )


def initialise_generator(generator: Generator, source: str, initial: Generator | None = None) -> None:
    """Starts a generator from the weights of another one; only what is dropped in training may differ.

    Raises:
        UsageError: it is of another network, or was trained with another tokenizer.
    """
    if initial is None:
        initial = load_generator(source)
    ours, theirs = _network(generator.config.transformer), _network(initial.config.transformer)
    for name, value in theirs.items():
        if ours[name] != value:
            raise UsageError(f"init.source {source} has {name} = {value}, the recipe {ours[name]}; make them the same")
    if generator.config.tokenizer is not None:
        initial.check_tokenizer(generator.config.tokenizer, "the recipe's tokenizer")
    names, before = generator.config.class_names, initial.config.class_names
    renamed = [(old, new) for old, new in zip(before or (), names or (), strict=False) if old != new]
    if renamed:
        old, new = renamed[0]
        warnings.warn(
            f"init.source {source} has other names for {len(renamed)} of its classes: "
            f"what it learned as {old!r} now is {new!r}",
            stacklevel=2,
        )
    load_strict(generator, initial.state_dict(), source)


def _network(config: NetworkConfig) -> dict[str, Any]:
    """The options that must agree for one network to take another's weights; the head by what it predicts."""
    free = {"dropout", "class_dropout", "gamma_init", "head", "factors"}
    vocabularies = getattr(config, "vocabularies", None)
    return {**config.model_dump(exclude=free), "kind": config.kind, "vocabularies": vocabularies}
