"""The discriminator of a tokenizer's training, with its optimizer and LeCAM."""

from typing import Any

import torch
from torch import Tensor, nn

from lexel.losses import LeCAM, discriminator_loss, generator_loss
from lexel.train.optimization import RunningMeans, fused, optimizer_step, set_layout, set_learning_rate
from lexel.train.processes import Processes
from lexel.train.recipes import DiscriminatorConfig, TrainConfig


class Adversary:
    """The discriminator and everything that belongs to it.

    `parts` names what a checkpoint must hold of it.
    """

    def __init__(self, train: TrainConfig, config: DiscriminatorConfig, processes: Processes) -> None:
        self.train, self.config, self.processes = train, config, processes
        device = processes.device
        self.lr = config.lr or train.lr
        self.discriminator = config.build().to(device)
        set_layout(self.discriminator, train.channels_last)
        # Its means move with every micro-batch; over a whole step they decay as the recipe says.
        self.lecam = LeCAM(config.lecam_decay ** (1 / train.accumulation)).to(device)
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(),
            self.lr,
            (train.betas[0], train.betas[1]),
            fused=fused(device, train.precision),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.ddp_module = processes.parallel(self.discriminator)
        self.parts: dict[str, Any] = {
            "discriminator": self.discriminator,
            "lecam": self.lecam,
            "discriminator_optimizer": self.optimizer,
            "discriminator_scaler": self.scaler,
        }

    def step(self, reals: list[Tensor], fakes: list[Tensor], lr_factor: float) -> dict[str, Tensor]:
        """One step on micro-batches of images and of their reconstructions, each (B, 3, H, W); returns the losses."""
        means = RunningMeans()
        self.optimizer.zero_grad(set_to_none=True)
        for number, (real, fake) in enumerate(zip(reals, fakes, strict=True)):
            with self.processes.no_sync_unless(number == len(reals) - 1, self.ddp_module):
                with self.processes.runtime.autocast():
                    logits_real, logits_fake = self._logits(self.ddp_module, real), self._logits(self.ddp_module, fake)
                    terms = {"discriminator": discriminator_loss(self.config.loss, logits_real, logits_fake)}
                    loss = terms["discriminator"]
                    if self.config.lecam:
                        terms["lecam"] = self.lecam(logits_real, logits_fake)
                        loss = loss + self.config.lecam * terms["lecam"]
                self.scaler.scale(loss / len(reals)).backward()
            means.add({**terms, "logits_real": logits_real.float().mean(), "logits_fake": logits_fake.float().mean()})
        set_learning_rate(self.optimizer, lr_factor * self.lr)
        norm = optimizer_step(self.optimizer, self.scaler, self.discriminator.parameters(), self.train.clip)
        return {**means.tensors(), "discriminator_gradient_norm": norm}

    def generator_loss(self, reconstructions: Tensor) -> Tensor:
        """The adversarial term of the tokenizer's loss: a scalar."""
        return generator_loss(self.config.generator_loss, self._logits(self.discriminator, reconstructions))

    def _logits(self, discriminator: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w); batch norm takes its statistics over as many images as the recipe says."""
        statistics = self.config.statistics
        groups = images.split(len(images) if statistics == "process" else statistics)
        logits = [discriminator(group) for group in groups]
        return logits[0] if len(logits) == 1 else torch.cat(logits)
