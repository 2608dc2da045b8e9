"""Every method on every task, and each method's formula by hand."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import tl_modules
from datamodules import ImageArrays
from tl_modules import L2SP, Classification, ConvNet, Method, TransferModule


def exported(base):
    """Every public subclass, so that a new one is tested by existing."""
    return [c for c in vars(tl_modules).values() if isinstance(c, type) and issubclass(c, base) and c is not base]


@pytest.fixture
def arrays(tmp_path):
    """Two domains of grey images, with class labels or real values."""

    def make(kind):
        generator = np.random.default_rng(0)
        for name in ("source", "target"):
            images = generator.integers(0, 256, (24, 28, 28), dtype=np.uint8)
            labels = np.arange(24) % 3 if kind is Classification else images.mean((1, 2)) / 255
            np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
        return ImageArrays(tmp_path / "target.npz", tmp_path / "source.npz", target_labels=True, batch_size=8)

    return make


@pytest.mark.parametrize("task", exported(TransferModule), ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", exported(Method), ids=lambda c: c.__name__)
def test_every_method_on_every_task(method, task, arrays):
    seed_everything(0)
    data = arrays(task)
    module = task(ConvNet(4), data.num_outputs, class_names=data.class_names, methods=[method(), method(weight=0.5)])
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, data)
    names = [name for name, _ in module.named_methods()]
    assert names == [method.__name__.lower(), f"{method.__name__.lower()}_2"]
    metrics = trainer.callback_metrics
    for term in ("loss", "task/source", "task/target", *names):
        assert torch.isfinite(metrics[f"train/{term}"])
    parts = [metrics[f"train/{term}"] for term in ("task/source", "task/target", *names)]
    assert torch.allclose(metrics["train/loss"], torch.stack(parts).sum(), rtol=1e-4)
    trainer.test(module, data, verbose=False)
    assert f"test/{module.monitor[0].removeprefix('val/')}" in trainer.callback_metrics


def test_l2sp_by_hand():
    module = Classification(ConvNet(4), 3, methods=[L2SP(weight=1.0, head_weight=0.5)])
    method = module.methods[0]
    with torch.no_grad():
        for parameter in module.head.parameters():
            parameter.fill_(2.0)
    head = 0.5 * 4.0 * sum(p.numel() for p in module.head.parameters()) / 2
    assert float(method(module, None, None)) == pytest.approx(head)
    weights = sum(p.numel() for p in module.backbone.parameters())
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            parameter.add_(0.1)
    term = method(module, None, None)
    assert float(term) == pytest.approx(head + 0.01 * weights / 2, rel=1e-4)
    term.backward()
    first = next(module.backbone.parameters())
    assert torch.allclose(first.grad, torch.full_like(first, 0.1), atol=1e-6)


def test_l2sp_start_is_in_the_checkpoint():
    module = Classification(ConvNet(4), 3, methods=[L2SP()])
    assert any(key.startswith("methods.0.start_") for key in module.state_dict())
    assert not any(p.requires_grad for p in module.methods.parameters())
