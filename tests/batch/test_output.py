"""Which inputs pass as one batch, and their domains: from our loaders and from foreign ones."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from tl_modules import MCC, MLDG, Classification, ConvNet, UserError


def loader(seed=0, **options):
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(24, 3, 28, 28, generator=random)
    return DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=8, shuffle=True, **options)


class Foreign(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return [loader(1), loader(2)]


LOADERS = {
    "single": (lambda: loader(), {"target"}),
    "list": (lambda: [loader(1), loader(2)], {"source", "target"}),
    "list of one": (lambda: [loader(1)], {"target"}),
    "list of three": (lambda: [loader(1), loader(2), loader(3)], {"source", "target"}),
    "dict": (lambda: {"source": loader(1), "target": loader(2)}, {"source", "target"}),
    "CombinedLoader": (lambda: CombinedLoader({"target": loader(1)}), {"target"}),
    "LightningDataModule": (Foreign, {"target"}),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_ones_own_loaders_are_served(kind):
    make, domains = LOADERS[kind]
    module = Classification(ConvNet(4), 3, methods=[MCC()])
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    given = make()
    own = isinstance(given, LightningDataModule)
    trainer.fit(module, **({"datamodule": given} if own else {"train_dataloaders": given, "val_dataloaders": loader()}))
    terms = {key for key in trainer.callback_metrics if key.startswith("train/")}
    assert {f"train/task/{domain}" for domain in domains} | {"train/mcc"} <= terms
    assert "val/accuracy" in trainer.callback_metrics
    assert ("val/accuracy/dataloader_idx_1" in trainer.callback_metrics) == own
    assert len(trainer.predict(module, loader())) == 3


def test_a_target_without_labels_is_a_tensor():
    class Bare(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return torch.rand(3, 28, 28)

    module = Classification(ConvNet(4), 3, methods=[MCC()])
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, [loader(), DataLoader(Bare(), batch_size=8)], loader())
    assert {"train/task/source", "train/mcc"} <= trainer.callback_metrics.keys()
    assert "train/task/target" not in trainer.callback_metrics


def test_a_domain_of_another_name():
    module = Classification(ConvNet(4), 3)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UserError, match="unknown domain photos; the names are target, and source"):
        trainer.fit(module, {"photos": loader()})


def test_bytes_beside_floats_are_of_one_scale():
    align = ConvNet(4).align
    one, other = align([torch.full((2, 3, 4, 4), 200, dtype=torch.uint8), torch.full((2, 1, 4, 4), 0.5)])
    assert one.unique() == pytest.approx(200 / 255)
    assert other.unique() == 0.5
    assert one.dtype == other.dtype == torch.float32
    assert other.shape == one.shape
    both = align([torch.zeros(1, 3, 4, 4, dtype=torch.uint8)] * 2)
    assert both[0].dtype == torch.uint8  # the backbone scales them


def unequal():
    y = torch.tensor([0, 1])
    return {
        "source/a": (torch.rand(2, 3, 28, 28), y),
        "source/b": (torch.rand(2, 3, 32, 32), y),
        "target": (torch.rand(2, 3, 28, 28), y),
    }


def test_sources_of_unequal_size_are_named():
    with pytest.raises(UserError, match=r"unequal shapes \(source/a \(3, 28, 28\), source/b \(3, 32, 32\)\)"):
        Classification(ConvNet(4), 3, methods=[MLDG()]).training_step(unequal(), 0)


def test_sources_of_unequal_size_train():
    Classification(ConvNet(4), 3, methods=[MCC()]).training_step(unequal(), 0).backward()
