"""Augmentation on the device: of the images alone, and the same whatever batch or process a sample is in."""

from types import SimpleNamespace

import pytest
import torch
from cases import Several, build, fit
from torchvision.transforms import v2

from tl_modules import BatchAugmentation, Classification, ConvNet
from tl_modules.batch.samples import AnnotatedBatch, Batch
from tl_modules.errors import UserError


def made(*transforms, step=0):
    torch.manual_seed(0)
    module = Classification(
        ConvNet(2), 3, methods=[BatchAugmentation(list(transforms) or [v2.ColorJitter(0.5, hue=0.2)])]
    )
    module._trainer = SimpleNamespace(global_step=step, current_epoch=0)
    return module


def images(count=6):
    return torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def augmented(module, x, index, domain="target"):
    (found,) = module.methods[0].transform_batch(module, {domain: Batch(x, torch.zeros(len(x)), index)}).values()
    return found.x


def test_a_sample_is_augmented_alike_in_every_batch(monkeypatch):
    module, x, index = made(), images(), torch.arange(6) * 7
    state = torch.get_rng_state()
    whole = augmented(module, x, index)
    assert torch.equal(torch.get_rng_state(), state)
    for rank in (0, 1):  # as two processes share a batch
        assert torch.equal(augmented(module, x[rank::2], index[rank::2]), whole[rank::2])
    assert torch.equal(augmented(made(), x, index), whole)  # another run with the same seed
    same = augmented(module, x[:1].expand(6, -1, -1, -1), index)
    assert len(same.flatten(1).unique(dim=0)) == 6  # each sample draws by itself
    assert not torch.equal(augmented(module, x, index, "source"), whole)
    module.trainer.global_step = 1
    assert not torch.equal(augmented(module, x, index), whole)
    assert whole.dtype == torch.float32
    assert 0 <= whole.min() < whole.max() <= 1


def test_only_images_are_augmented_and_the_rest_of_the_batch_is_kept():
    module = made(v2.RandomHorizontalFlip(1.0), v2.RandomInvert(1.0))
    title, y, weight = torch.arange(6), torch.arange(6), torch.ones(6)
    x = {"photo": images(), "title": title}
    batch = {"target": AnnotatedBatch(x, y, torch.arange(6), weight, {"a": title})}
    found = module.methods[0].transform_batch(module, batch)["target"]
    assert torch.equal(found.x["photo"], 1 - images().flip(-1) / 255)
    assert found.x["title"] is title
    assert found[1:4] == (y, batch["target"].index, weight)
    assert found.taught is None  # of the images as they were


def test_it_trains_and_needs_images():
    fit(build([BatchAugmentation], "image"), Several("image"), epochs=1)
    with pytest.raises(UserError, match="BatchAugmentation augments images, which the inputs lack; leave it out"):
        fit(build([BatchAugmentation], "vector"), Several("vector"), epochs=1)
    with pytest.raises(UserError, match="BatchAugmentation needs transforms"):
        BatchAugmentation([])
