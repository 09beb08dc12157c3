"""Every autoencoder under one contract. A new one is one file and one line here."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lexel import registry
from lexel.autoencoders.base import Autoencoder, AutoencoderConfig
from lexel.autoencoders.dynamic import Dynamic, DynamicConfig
from lexel.autoencoders.magvit2 import Magvit, MagvitConfig
from lexel.autoencoders.maskgit import MaskGIT, MaskGITConfig
from lexel.autoencoders.simvq import SimVQAutoencoder, SimVQConfig
from lexel.autoencoders.titok import TiTok, TiTokConfig
from lexel.autoencoders.vit import ViT, ViTConfig
from lexel.autoencoders.vqgan import VQGAN, VQGANConfig
from lexel.autoencoders.vqvae import VQVAE, VQVAEConfig
from lexel.autoencoders.vqvae2 import VQVAE2, VQVAE2Config

AUTOENCODERS: dict[str, type[Autoencoder]] = {
    "vqgan": VQGAN,
    "magvit2": Magvit,
    "simvq": SimVQAutoencoder,
    "maskgit": MaskGIT,
    "vit": ViT,
    "titok": TiTok,
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
    "dynamic": Dynamic,
}
GROUP = "lexel.autoencoders"  # the entry points by which other packages add kinds


def autoencoder_class(kind: str) -> type[Autoencoder]:
    """The class behind a name in AUTOENCODERS, or behind an entry point of other packages.

    Raises:
        UsageError: the name is unknown.
    """
    return registry.lookup(AUTOENCODERS, kind, "autoencoder", GROUP)


def parse(given: Any) -> Any:
    """The typed configuration of a table whose `kind` names the autoencoder ("vqgan" where it is missing).

    `design`, the word of version 0.1, is accepted for `kind`. What is no table is returned as it is.

    Raises:
        ValueError: the kind is unknown (UsageError), or the options do not fit it.
    """
    if not isinstance(given, Mapping):
        return given
    table = dict(given)
    if "design" in table:
        table.setdefault("kind", table.pop("design"))
    config = autoencoder_class(table.setdefault("kind", "vqgan")).config_class
    try:
        return config.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] != "extra_forbidden" or len(first["loc"]) > 1:
            raise
        options = ", ".join(name for name in config.model_fields if name != "kind")
        raise ValueError(
            f"the {table['kind']} autoencoder has no option {first['loc'][0]!r}; its options are {options}"
        ) from None


def build(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder of a configuration, its weights drawn anew."""
    return autoencoder_class(config.kind)(config)


__all__ = [
    "AUTOENCODERS",
    "VQGAN",
    "VQVAE",
    "VQVAE2",
    "Autoencoder",
    "AutoencoderConfig",
    "Dynamic",
    "DynamicConfig",
    "Magvit",
    "MagvitConfig",
    "MaskGIT",
    "MaskGITConfig",
    "SimVQAutoencoder",
    "SimVQConfig",
    "TiTok",
    "TiTokConfig",
    "VQGANConfig",
    "VQVAE2Config",
    "VQVAEConfig",
    "ViT",
    "ViTConfig",
    "autoencoder_class",
    "build",
    "parse",
]
