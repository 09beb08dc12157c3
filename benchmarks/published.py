"""Published code as it is: classes imported from a checkout of the user's own, with stand-ins for what is around them.

No line of it is in this repository. What a step of training needs is imported where it lies; the training framework,
torchvision and downloads are replaced by the least that gives the same numbers, and gives the published code no work
beyond its own: the stand-in's `log_dict`, for one, only keeps the last values.
"""

import contextlib
import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor, nn

from lexel.networks.vgg16 import VGG16

TOKENIZER = "src/IBQ/models/ibqgan.py"  # in https://github.com/TencentARC/SEED-Voken
GENERATOR = "src/IBQ/models/cond_transformer_llama.py"  # there too
SAMPLER = "autoregressive/models/generate.py"  # in https://github.com/FoundationVision/LlamaGen


class LightningModule(nn.Module):
    """What published models ask of the class of this name: optimizers that step where they say; the log is a table."""

    global_step = 0
    trainer = SimpleNamespace(profiler=SimpleNamespace(start=str, stop=str))
    chosen: Any  # optimizers: a list, or the only one
    logged: dict[str, Tensor]

    def optimizers(self) -> Any:
        return self.chosen

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()

    def log(self, *_: Any, **__: Any) -> None: ...

    def log_dict(self, values: dict[str, Tensor], **_: Any) -> None:
        self.logged = {**vars(self).get("logged", {}), **values}


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _from_config(config: dict[str, Any]) -> Any:
    """What a configuration of the published code names, built."""
    module, name = config["target"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**config.get("params", {}))


@contextlib.contextmanager
def importing(checkout: Path, needed: str) -> Iterator[None]:
    """Inside, modules of a checkout can be imported; afterwards the names that they took are free again.

    Raises:
        SystemExit: the checkout lacks the file that is needed.
    """
    if not (checkout / needed).exists():
        raise SystemExit(f"--peer names a checkout of published code: {checkout / needed} is not there")
    checkout = checkout.absolute()
    framework = {"LightningModule": LightningModule}
    models = _module("torchvision.models", vgg16=lambda pretrained: VGG16())  # its features are the published ones
    stand_ins = {
        "lightning": _module("lightning", **framework),
        "pytorch_lightning": _module("pytorch_lightning", **framework),
        "main": _module("main", instantiate_from_config=_from_config),
        "torchvision": _module("torchvision", models=models),
        "torchvision.models": models,
    }
    own = {entry.stem for entry in checkout.iterdir()}  # its packages: src, autoregressive, utils
    before = dict(sys.modules)
    sys.modules.update(stand_ins)
    try:
        with mock.patch.object(sys, "path", [str(checkout), *sys.path]), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name in sys.modules.keys() - before.keys():
            if name in stand_ins or name.split(".")[0] in own:
                del sys.modules[name]
        sys.modules.update(before)


def commit(checkout: Path) -> str:
    """The short name of a checkout's commit; empty where git cannot tell."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def tokenizer(checkout: Path, size: int, dim: int, side: int, width: int, blocks: int, lr: float) -> Any:
    """The published IBQ model in training, with its loss, discriminator, averages and optimizers.

    Other numbers are those of its ImageNet configurations. Weights of LPIPS are random: time does not depend on them.

    Args:
        checkout: of SEED-Voken.
        size: K.
        dim: D, which is the number of latent channels too.
        side: of the images, in pixels, a multiple of 16.
        width: channels of the first convolution.
        blocks: residual blocks of a level.
        lr: rate of both optimizers.
    """
    network: dict[str, Any] = {
        "double_z": False,
        "z_channels": dim,
        "resolution": side,
        "in_channels": 3,
        "out_ch": 3,
        "ch": width,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": blocks,
        "attn_resolutions": [side // 16],  # the deepest, as at 256 px
        "dropout": 0.0,
    }
    weights: dict[str, Any] = {
        "disc_conditional": False,
        "disc_in_channels": 3,
        "disc_start": 0,
        "disc_weight": 0.4,
        "quant_loss_weight": 1.0,
        "entropy_loss_weight": 0.05,
        "gen_loss_weight": 0.1,
        "lecam_loss_weight": 0.05,
    }
    loss = {"target": "src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": weights}
    with importing(checkout, TOKENIZER):
        perceptual = importlib.import_module("src.IBQ.modules.losses.lpips").LPIPS
        with mock.patch.object(perceptual, "load_from_pretrained"):
            model = importlib.import_module("src.IBQ.models.ibqgan").IBQ(
                network, loss, size, dim, learning_rate=lr, use_entropy_loss=True, use_ema=True, gradient_clip_val=0
            )
    model.chosen = [each["optimizer"] for each in model.configure_optimizers()]
    for head in (getattr(model.loss.perceptual_loss, f"lin{number}") for number in range(5)):
        nn.init.uniform_(head.model[-1].weight)
    model.train()
    model.loss.perceptual_loss.eval()  # as its version of the framework leaves it: no dropout
    return model


def lpips(model: Any) -> dict[str, Tensor]:
    """The weights of a published model's LPIPS under the names that `lexel.networks.weights` gives them."""
    perceptual = model.loss.perceptual_loss
    trunk = {name.split(".", 1)[1]: tensor for name, tensor in perceptual.net.state_dict().items()}
    heads = {f"heads.{number}": getattr(perceptual, f"lin{number}").model[-1].weight for number in range(5)}
    return {**{f"features.{name}": tensor for name, tensor in trunk.items()}, **heads}


def tokenizer_step(model: Any, images: Tensor) -> Callable[[], None]:
    """One published step on images (B, 3, H, W), with what its framework calls after a batch."""
    batch = {"image": images.permute(0, 2, 3, 1)}

    def step() -> None:
        model.training_step(batch, model.global_step)
        model.global_step += 1
        model.on_train_batch_end()

    return step


def generator(checkout: Path, size: str, classes: int, tokens: int) -> tuple[tuple[Any, Any], Any]:
    """LlamaGen's modules (network, sampling), and its class-conditional network of a size ("B", ...) for sampling."""
    with importing(checkout, SAMPLER):
        modules = tuple(importlib.import_module(f"autoregressive.models.{name}") for name in ("gpt", "generate"))
        model = modules[0].GPT_models[f"GPT-{size}"](
            vocab_size=16384, block_size=tokens, num_classes=classes, cls_token_num=1, model_type="c2i"
        )
    return (modules[0], modules[1]), model.eval()


class GivenTokens(nn.Module):
    """Stands for the published tokenizer where tokens are given as if they were pictures (B, 1, h, w)."""

    def encode(self, tokens: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        return tokens, None, (None, None, tokens.flatten())


class Labels(nn.Module):
    """Stands for the stage that hands class labels on."""

    def encode(self, labels: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        return labels, None, (None, None, labels[:, None])


def transformer(checkout: Path, network: Any, lr: float, weight_decay: float) -> Any:
    """The published class-conditional generator in training, with its optimizer.

    Args:
        checkout: of SEED-Voken.
        network: its shape, a `lexel.generators.NextTokenConfig`.
        lr: the peak of its rate.
        weight_decay: of its matrices.
    """
    options = {
        "vocab_size": network.codebook_size,
        "block_size": network.rows * network.columns,
        "n_layer": network.layers,
        "n_head": network.heads,
        "n_embd": network.width,
        "cond_dim": network.width,
        "resid_dropout_p": network.dropout,
        "ffn_dropout_p": network.dropout,
        "token_drop": network.dropout,
        "drop_path_rate": 0.0,
        "alng": network.gamma_init,
        "class_num": network.classes,
    }
    with importing(checkout, GENERATOR):
        model = importlib.import_module("src.IBQ.models.cond_transformer_llama").Net2NetTransformer(
            {"target": "src.IBQ.modules.transformer.llama.GPT", "params": options},
            {"target": f"{__name__}.GivenTokens"},
            {"target": f"{__name__}.Labels"},
            cond_stage_key="class_label",
            learning_rate=lr,
            weight_decay=weight_decay,
            wp=6,
            wpe=0.1,
        )
    model.chosen = model.configure_optimizers()
    # Amid its 300 epochs, where the rate is the peak's.
    model.trainer = SimpleNamespace(global_step=20000, max_epochs=300, train_dataloader=range(1669))
    return model.train()


def as_batch(tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"image": tokens, "class_label": labels}


def transformer_step(model: Any, tokens: Tensor, labels: Tensor) -> Callable[[], None]:
    """One published step on tokens (B, h, w), in its framework's order: the gradient is clipped at 1."""
    batch = as_batch(tokens, labels)

    def step() -> None:
        model.chosen.zero_grad()
        model.training_step(batch, 0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model.chosen.step()

    return step
