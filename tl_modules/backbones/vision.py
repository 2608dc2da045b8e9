"""Image backbones: any classifier of torchvision, timm or a torch.hub repository.

    uint8 or float in [0, 1], (B, 1 or 3, H, W) -> normalise -> stage 0 -> stage 1 -> ... -> pool -> (B, out_features)

A foreign classifier loses its last layer: the features are that layer's input. Its stages are the runs of blocks at one
resolution, or the single blocks of a transformer.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import Backbone, PretrainedWeights
from tl_modules.backbones.stages import resolution_stages, stages_by_name, strip_classifier, suits_channels_last
from tl_modules.backbones.weights import Pretrained, StateDict, linear_head
from tl_modules.checkpoints.files import fill_in
from tl_modules.errors import UserError, closest

__all__ = ["ImageBackbone", "TimmBackbone", "TorchHubBackbone", "TorchvisionBackbone"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# None instead of the numbers: when a config changes the class, arguments that both classes have are kept
Statistics = Sequence[float] | None
# of a convolution, of pooling, of branches at several scales
_WRONG_SIZE = re.compile("Kernel size can't be greater|Output size is too small|size of tensor a .* must match")


class Normalize(nn.Module):
    """Standardises images by channel mean and deviation; a module, so that cached images are not normalised again."""

    in_no_stage = True  # but counts as frozen, since it has no parameters

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        self.channels_last = channels_last

    def forward(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Maps (B, 1 or C, H, W) uint8, or float in [0, 1], to (B, C, H, W), in the network's memory layout."""
        x = images.to(mean.dtype)
        if images.dtype == torch.uint8:
            x = x / 255
        x = (x.expand(-1, len(mean), -1, -1) - mean) / std
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def pooled(features: Tensor) -> Tensor:
    """Averages (B, C, h, w) to (B, C); returns (B, C) as it is."""
    return features.mean((2, 3)) if features.ndim == 4 else features


class ImageBackbone(Backbone):
    """Normalises images and runs `model` on them; the base class of image backbones.

    Args:
        model: Maps (B, C, H, W) floats to (B, out_features), or to (B, out_features, h, w), which is averaged.
        out_features: Width of the features.
        mean: Per channel, on the [0, 1] scale; None is ImageNet's.
        std: Per channel, on the [0, 1] scale; None is ImageNet's.

    Attributes:
        side: The only image side, in pixels, that `model` takes; None: any.
    """

    mean: Tensor
    std: Tensor
    side: int | None = None

    def __init__(self, model: nn.Module, out_features: int, mean: Statistics = None, std: Statistics = None) -> None:
        super().__init__()
        self.normalize = Normalize(suits_channels_last(model))
        self.model = model.to(memory_format=torch.channels_last) if self.normalize.channels_last else model
        # on CPUs grouped convolutions train slower in bfloat16 (benchmarks/precision.py)
        grouped = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
        self.bf16_devices = ("cuda",) if grouped else ("cuda", "cpu")
        self.out_features = out_features
        self.register_buffer("mean", torch.tensor(mean or IMAGENET_MEAN).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std or IMAGENET_STD).view(-1, 1, 1))

    def preprocess(self, images: Tensor) -> Tensor:
        """Converts uint8 or [0, 1] images to normalised floats; a single grey channel is repeated.

        Raises:
            UserError: The images have unequal sizes, or another size than the network takes.
        """
        if not isinstance(images, Tensor):
            raise UserError(
                f"data: {type(self).__name__} takes images of one size, but a batch has several sizes; resize them in "
                "the data set"
            )
        if self.side is not None and images.shape[-2:] != (self.side, self.side):
            height, width = images.shape[-2:]
            other = f", or, if it can be so built, --model.backbone.image_size {height}" if height == width else ""
            raise UserError(
                f"image_size: {self.name} takes images of {self.side} x {self.side} pixels, but the data's have "
                f"{height} x {width}; pass --data.image_size {self.side}{other}"
            )
        normalized: Tensor = self.normalize(images, self.mean, self.std)
        return normalized

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, 1 or 3, H, W) uint8, or float in [0, 1], to (B, out_features).

        Raises:
            UserError: The images are too small for `model`, or not of a size that it can divide.
        """
        images = self.preprocess(x)
        try:
            return pooled(self.model(images))
        except RuntimeError as error:
            if not _WRONG_SIZE.search(str(error)):
                raise
            size = " x ".join(map(str, images.shape[-2:]))
            raise UserError(
                f"image_size: {self.name or type(self).__name__} cannot take images of {size} pixels ({error}); "
                "pass a larger --data.image_size, such as 224, or a network for small images, such as ConvNet"
            ) from error

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Rejects inputs that are not images.

        Raises:
            UserError: The schema names another kind of input.
        """
        self.refuse_others(x, "image", "images", "; use a backbone for these, e.g. TabularMLP for numeric columns")

    def align(self, xs: list[Any]) -> list[Any]:
        """Expands grey images to three channels beside coloured ones, and scales bytes to [0, 1] beside floats."""
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in xs):
            xs = [x.float() / 255 if isinstance(x, Tensor) and x.dtype == torch.uint8 else x for x in xs]
        images = [x for x in xs if isinstance(x, Tensor) and x.ndim == 4]
        channels = max((x.shape[1] for x in images), default=1)
        if len(images) < len(xs) or {x.shape[1] for x in images} != {1, channels}:
            return xs
        return [x.expand(-1, channels, -1, -1) for x in images]

    def stages(self) -> list[nn.Module]:
        """Divides `model` where its resolution drops and before each transformer block."""
        return resolution_stages(self.model)


class TorchvisionBackbone(ImageBackbone):
    """Any classifier of torchvision.models without its last layer.

    Args:
        name: A name in torchvision.models.list_models(torchvision.models), e.g. resnet50.
        weights: A torchvision weights name (DEFAULT, IMAGENET1K_V1, ...: downloaded), a local file, or a run of `tl
            fit`.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        mean: Per channel, on the [0, 1] scale; None is the weights' own.
        std: Per channel, on the [0, 1] scale; None is the weights' own.
        image_size: Side of the images in pixels; None is the weights' own. A ViT or MaxViT is built for this size, and
            position embeddings of another size are interpolated.
        weights_prefix: Prefix of the names in a file of weights, e.g. `teacher.backbone.`; None finds it.

    Raises:
        UserError: The name is unknown; the weights cannot be fetched or do not fit; the network does not support the
            size.
    """

    def __init__(
        self,
        name: str,
        weights: PretrainedWeights = None,
        strict: bool = True,
        mean: Statistics = None,
        std: Statistics = None,
        image_size: int | None = None,
        weights_prefix: str | None = None,
    ) -> None:
        from torchvision import models

        names = models.list_models(module=models)
        if name not in names:
            raise UserError(f"name: torchvision has no classifier {name}{closest(name, names)}")
        # these two have an auxiliary classifier for training from scratch, and an initialisation that takes a minute
        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": False}
        known = models.get_model_weights(name).__members__
        # the size of a local file's weights is unknown: assume the network's standard size
        usual = min(known.values(), key=lambda entry: entry.transforms().crop_size[0], default=None)
        entry = known.get(str(weights), usual)
        preset = None if entry is None else entry.transforms()
        if name.startswith(("vit_", "maxvit_")):
            self.side = image_size or (preset.crop_size[0] if preset else 224)
            options = {"image_size": self.side} if name.startswith("vit_") else {"input_size": (self.side,) * 2}
        try:
            model = models.get_model(name, weights=None, **options)
        except (AssertionError, ValueError) as error:
            raise UserError(f"image_size: {name} cannot be built for {self.side} pixels ({error})") from error
        classifier = strip_classifier(model)
        if classifier is None:  # pragma: no cover - a family newer than this file
            raise UserError(f"name: the last layer of {name} was not recognised; wrap it in your own Backbone")
        if weights is not None and preset is not None:
            mean, std = mean or preset.mean, std or preset.std
        super().__init__(model, classifier.in_features, mean, std)
        self.name, self.classifier = name, classifier.name
        if preset is not None and (weights is not None or image_size or self.side):
            crop, resize = preset.crop_size[0], preset.resize_size[0]
            self.data_defaults = as_measured(crop, resize, preset.interpolation.value, image_size or self.side)

        def resized(state: StateDict) -> StateDict:
            from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

            if not isinstance(model, VisionTransformer) or "encoder.pos_embedding" not in state:
                return state
            fits: StateDict = interpolate_embeddings(model.image_size, model.patch_size, OrderedDict(state))
            return fits

        def hub(entry: str) -> StateDict:
            if entry not in known:
                raise UserError(
                    f"weights: {name} has no weights {entry}{closest(entry, known)}; "
                    f"known: {', '.join(known)}, or give a local file or the directory of a run"
                )
            try:
                state: StateDict = known[entry].get_state_dict(progress=False, check_hash=True)
            except (URLError, OSError) as error:
                raise UserError(_offline(f"{name} {entry}", known[entry].url)) from error
            return state

        self.load_pretrained(weights, strict, hub, resized, weights_prefix)


class TimmBackbone(ImageBackbone):
    """Any model of timm without its classifier (`pip install 'lightning-transfer[timm]'`).

    Args:
        name: A name in timm.list_models(), e.g. vit_small_patch16_224 or resnet50.a1_in1k.
        weights: DEFAULT for timm's pretrained weights of this name (downloaded), a local file, or a run.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        image_size: Side of the images in pixels; None is the weights' own. A network with a fixed input size (ViT,
            Swin, ...) is built for it, and position embeddings of another size are interpolated.
        weights_prefix: Prefix of the names in a file of weights, e.g. `teacher.backbone.`; None finds it.

    Raises:
        UserError: timm is missing, the name is unknown, the weights cannot be fetched or do not fit, or the network
            does not support the size.
    """

    def __init__(
        self,
        name: str,
        weights: PretrainedWeights = None,
        strict: bool = True,
        image_size: int | None = None,
        weights_prefix: str | None = None,
    ) -> None:
        try:
            import timm
        except ImportError as error:
            raise UserError("TimmBackbone needs timm: pip install 'lightning-transfer[timm]'") from error
        if not timm.is_model(name.split(".")[0]):
            raise UserError(f"name: timm has no model {name}{closest(name, timm.list_models())}")
        known: Any = timm.get_pretrained_cfg(name)
        fixed = known is not None and known.fixed_input_size
        sized: dict[str, Any] = {"img_size": image_size} if fixed and image_size else {}
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **sized)
            if getattr(getattr(model, "patch_embed", None), "num_patches", None) == 0:
                raise ValueError("a patch is larger")
        except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            if not sized:
                raise
            raise UserError(f"image_size: {name} cannot be built for {image_size} pixels ({error})") from error
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        # some heads widen the features after pooling, and only timm knows by how much
        width: Any = getattr(model, "head_hidden_size", None) or model.num_features
        super().__init__(model, width, config.get("mean"), config.get("std"))
        self.name, self.classifier = name, str(config.get("classifier", ""))
        size = config["input_size"][-1]
        self.side = (image_size or size) if fixed else None
        if weights is not None or self.side or image_size:
            resize = int(size / config["crop_pct"])
            self.data_defaults = as_measured(size, resize, config["interpolation"], image_size)

        def resized(state: StateDict) -> StateDict:
            adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # by family
            return state if adapt is None else adapt(dict(state), model)

        def hub(entry: str) -> StateDict:
            if entry != "DEFAULT":
                raise UserError(f"weights: {entry} is not a file or run; DEFAULT means timm's weights of {name}")
            try:
                state: StateDict = timm.create_model(name, pretrained=True).state_dict()
            except (OSError, RuntimeError) as error:  # the hub client's offline error is an OSError
                raise UserError(_offline(f"timm's {name}")) from error
            return state

        self.load_pretrained(weights, strict, hub, resized, weights_prefix)

    def stages(self) -> list[nn.Module]:
        """Returns the groups that timm defines for layer-wise learning rates."""
        from timm.models import group_parameters

        model: Any = self.model
        if not hasattr(model, "group_matcher"):
            return super().stages()
        return stages_by_name(model, group_parameters(model, model.group_matcher(coarse=True), reverse=True))


class TorchHubBackbone(ImageBackbone):
    """An entry of a torch.hub repository. **This runs that repository's code**, so use only one that you trust.

    Args:
        repo: A local folder with a hubconf.py, or owner/name[:ref] on GitHub.
        name: The entry point in its hubconf.py.
        arguments: Passed to the entry point, e.g. {pretrained: true}. Its weights count as pretrained, unless
            `pretrained` or `weights` in them says otherwise.
        weights: A local file or a run of `tl fit`; None keeps the entry point's weights.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        image_size: Side in pixels of the images used to find the width of the features, if it is not known.
        mean: Per channel, on the [0, 1] scale; None is ImageNet's.
        std: Per channel, on the [0, 1] scale; None is ImageNet's.
        weights_prefix: Prefix of the names in a file of weights, e.g. `teacher.backbone.`; None finds it.

    Raises:
        UserError: The repository or entry is not found, or the weights do not fit.
    """

    def __init__(
        self,
        repo: Path | str,
        name: str,
        arguments: dict[str, Any] | None = None,
        weights: PretrainedWeights = None,
        strict: bool = True,
        image_size: int = 224,
        mean: Statistics = None,
        std: Statistics = None,
        weights_prefix: str | None = None,
    ) -> None:
        folder = fill_in(repo)
        source = "local" if folder.is_dir() else "github"
        if source == "local" and not (folder / "hubconf.py").is_file():
            raise UserError(f"repo: {folder} has no hubconf.py, so it is not a torch.hub repository")
        if source == "github" and str(repo).count("/") != 1:
            raise UserError(f"repo: {repo} is neither a folder nor owner/name on GitHub")
        where = str(folder if source == "local" else repo)
        try:
            load_entry: Any = torch.hub.load
            model = load_entry(where, name, source=source, trust_repo=True, **(arguments or {}))
        except RuntimeError as error:
            if "Cannot find callable" not in str(error):
                raise
            raise UserError(f"name: the hubconf.py of {repo} has no entry {name}") from error
        except (URLError, OSError) as error:
            raise UserError(_offline(f"{repo} {name}")) from error
        if not isinstance(model, nn.Module):
            raise UserError(f"name: {repo} {name} returns a {type(model).__name__}, not a torch.nn.Module")
        classifier = strip_classifier(model)
        super().__init__(model, classifier.in_features if classifier else 0, mean, std)
        self.name, self.classifier = name, classifier.name if classifier else ""
        if classifier is None:
            with torch.no_grad():
                self.eval()
                self.out_features = self(torch.zeros(1, len(self.mean), image_size, image_size)).shape[1]
                self.train()

        def hub(entry: str) -> StateDict:
            raise UserError(
                f"weights: {entry} is not a file or run; a hub entry takes its own weights through `arguments`"
            )

        self.load_pretrained(weights, strict, hub, prefix=weights_prefix)
        said = [value for name, value in (arguments or {}).items() if name in ("pretrained", "weights")]
        self.random = weights is None and bool(said) and not any(said)  # many entries are pretrained by default
        if weights is None and not self.random:
            layer = {} if classifier is None else classifier.layer.state_dict(prefix=f"{classifier.name}.")
            self.pretrained = Pretrained(f"{repo} {name}", {}, linear_head(layer, self.classifier))


def as_measured(crop: int, resize: int, interpolation: str, image_size: int | None = None) -> dict[str, Any]:
    """Returns arguments of `ImageFolders` for the preprocessing with which weights were evaluated, sizes in pixels.

    Another `image_size` keeps the ratio of crop and resize.
    """
    side = image_size or crop
    resize = resize if side == crop else round(side * resize / crop)
    known = interpolation if interpolation in ("bilinear", "bicubic") else "bilinear"  # timm also has "random"
    return {"image_size": side, "resize_size": resize, "interpolation": known}


def _offline(what: str, url: str | None = None) -> str:
    """Returns advice for work without a network; if the URL is known, also where torch would store the file."""
    where = f"put it into {Path(torch.hub.get_dir()) / 'checkpoints'}, or " if url else ""
    return (
        f"weights: {what} could not be downloaded; without a network, fetch {url or 'the file'} elsewhere and "
        f"{where}pass --model.backbone.weights FILE"
    )
