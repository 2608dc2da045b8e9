"""Pretraining with a generator and a discriminator, whose backbone learns features of images."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.compat import finds_unused_parameters
from tl_modules.batch.output import full_precision, no_stats_update
from tl_modules.batch.samples import as_batch
from tl_modules.errors import UserError
from tl_modules.finetuning.optimizer import enable_fused
from tl_modules.module import Domains
from tl_modules.pretraining.base import SHOWN, Pretraining, input_kind
from tl_modules.pretraining.layers import upsampler

__all__ = ["GAN"]


class DCGANAdam(torch.optim.Adam):
    """Adam with less momentum, which DCGAN needs to be stable.

    Args:
        params: The parameters or groups of them.
        lr: The learning rate.
        betas: Decay rates of the averages of the gradient and of its square.
    """

    def __init__(self, params: Any, lr: float = 2e-4, betas: tuple[float, float] = (0.5, 0.999)) -> None:
        super().__init__(params, lr=lr, betas=betas)


class GAN(Pretraining):
    """A DCGAN whose discriminator consists of the backbone and a linear layer (Radford, Metz and Chintala, ICLR 2016).

    discriminator   `BCE(D(x), 1) + BCE(D(G(z)), 0)`
    generator       `BCE(D(G(z)), 1)`

    Each step updates the generator and then the discriminator, each with its own optimizer. TensorBoard gets samples of
    the same 64 vectors z after each epoch. Running statistics come from real images only.

    Args:
        backbone: Maps raw samples to features.
        latent: Length of z, standard normal.
        image_size: Side of the generated images, in pixels; real ones are resized to it.
        channels: Channels of generated images, 1 for grey ones, or 3.
        width: Channels of the generator's second to last layer.
        smoothing: Reduction of the label 1 of real images (0.1 in Salimans et al., NeurIPS 2016).
        optimizer: Optimizer class; each network gets its own.
        lr_scheduler: Scheduler of both optimizers.
        **kwargs: As for `Pretraining`.
    """

    def __init__(
        self,
        backbone: Backbone,
        latent: int = 100,
        image_size: int = 28,
        channels: int = 3,
        width: int = 32,
        smoothing: float = 0.1,
        optimizer: OptimizerCallable = lambda params: DCGANAdam(params, lr=2e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        def head(features: int) -> nn.Module:
            return nn.Linear(features, 1)

        super().__init__(backbone, head=head, optimizer=optimizer, lr_scheduler=lr_scheduler, **kwargs)
        if channels not in (1, 3):
            raise UserError(f"channels: {channels} must be 1 or 3")
        if input_kind(self.backbone, self.schema) != "image":
            raise UserError("model: GAN generates images, but the data's inputs are rows; use SCARF or Autoencoder")
        self.automatic_optimization = False
        self.latent, self.image_size, self.smoothing = latent, image_size, smoothing
        self.generator = nn.Sequential(upsampler(latent, channels, image_size, width), nn.Sigmoid())
        for parameter in self.generator.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("shown", torch.randn(SHOWN, latent))

    def generate(self, count: int) -> Tensor:
        """Draws images (count, channels, image_size, image_size) in [0, 1]."""
        images: Tensor = self.generator(torch.randn(count, self.latent, device=self.device))
        return images

    def judge(self, images: Tensor) -> Tensor:
        """Maps images to logits (B,) of being real."""
        (logits,) = self.project([images])
        return cast(Tensor, logits).squeeze(1).float()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Computes the loss of real and generated images, (B, C, H, W) each."""
        size = (self.image_size, self.image_size)
        if real.shape[-2:] != size:
            real = real.float() / 255 if real.dtype == torch.uint8 else real
            real = F.interpolate(real, size, mode="bilinear", antialias=True)
        logits = self.judge(real)
        with no_stats_update(self.backbone):
            others = self.judge(fake)
        true = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 1 - self.smoothing))
        return true + F.binary_cross_entropy_with_logits(others, torch.zeros_like(others))

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes the discriminator's loss; the generator's is computed in `training_step`."""
        return {"discriminator": self.discriminator_loss(views[0], self.generate(len(views[0])).detach())}

    def training_step(self, batch: Domains, batch_idx: int) -> Any:
        """Updates the generator, then the discriminator."""
        (real,) = self.views_of({name: as_batch(part) for name, part in batch.items()})
        count = samples.count(real)
        mine, its = self.optimizers()  # type: ignore[attr-defined]
        its = its.optimizer  # unwrapped: steps of Lightning's wrapper count as the run's
        with full_precision(self.device):
            fake = self.generate(count)
        with no_stats_update(self.backbone):
            judged = self.judge(fake)
        deceived = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        its.zero_grad()
        self.manual_backward(deceived)
        its.step()
        told = self.discriminator_loss(real, fake.detach())
        mine.zero_grad()
        self.manual_backward(told)
        mine.step()
        for scheduler in self.schedulers():
            scheduler.step()
        self.terms.add({"loss": told, "generator": deceived}, count)

    def schedulers(self) -> list[Any]:
        """Returns the schedulers that are due: those of each step, and after the last batch those of each epoch."""
        return [
            config.scheduler
            for config in self.trainer.lr_scheduler_configs
            if not config.reduce_on_plateau and (config.interval == "step" or self.trainer.is_last_batch)
        ]

    def configure_optimizers(self) -> Any:
        """Returns the discriminator's optimizer, with named groups as in any run, and the generator's."""
        own = super().configure_optimizers()
        first = own if isinstance(own, dict) else {"optimizer": own}
        group = {"name": "generator", "params": list(self.generator.parameters()), "lr_scale": 1.0}
        second: dict[str, Any] = {"optimizer": enable_fused(self.optimizer([group]))}
        if self.lr_scheduler is not None:
            second["lr_scheduler"] = first["lr_scheduler"] | {"scheduler": self.lr_scheduler(second["optimizer"])}
        return first, second

    def on_train_start(self) -> None:
        """Also rejects settings that two optimizers do not support.

        Raises:
            UserError: Plain ddp, or scaled gradients.
        """
        super().on_train_start()
        strategy = self.trainer.strategy
        if hasattr(strategy, "_ddp_kwargs") and not finds_unused_parameters(strategy):
            raise UserError(
                "strategy: GAN trains one network after the other, which plain ddp does not support; pass "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )
        if self.trainer.precision == "16-mixed":
            raise UserError("precision: GAN's two optimizers cannot share 16-mixed's scaler; use bf16-mixed or 32-true")

    def on_validation_epoch_end(self) -> None:
        """Also draws samples."""
        super().on_validation_epoch_end()
        if self.loggers and not self.trainer.sanity_checking:
            with torch.no_grad():
                self.show("generated", self.generator(self.get_buffer("shown")))
