"""Augmented data are cached as fixed views."""

import torch
from cache_runs import fit, folders, small
from conftest import make_tree
from torchvision.transforms.v2 import RandomAffine

from tl_modules import Method


def test_augmentation_runs_in_every_epoch_unless_views_are_asked_for(tree, tmp_path, said):
    from torchvision.transforms.v2 import RandomHorizontalFlip

    def run(**options):
        fit(folders(tree, augment=[RandomHorizontalFlip()]), small(), folder=str(tmp_path / "c"), **options)
        return said()

    assert any("augmentation changes the input of the frozen stages" in text for text in run())
    texts = run(views=3)
    assert any("target train: features cached" in text for text in texts)


def test_views_are_views_of_each_sample(tmp_path):
    seen = {}

    class Look(Method):
        def forward(self, module, source, target):
            for row, y in zip(target.features.detach(), target.y, strict=True):
                seen.setdefault(int(y), set()).add(tuple(row.tolist()))

    tree = make_tree(tmp_path / "t", (("train", 2), ("val", 2)))
    data = folders(tree, augment=[RandomAffine(180)])
    fit(data, small(methods=[Look()]), epochs=30, views=3, folder=str(tmp_path / "c"))
    assert all(len(rows) == 6 for rows in seen.values())  # two images of each class, three views of each


def test_a_pass_without_augmentation_takes_the_plain_view(tree, tmp_path):
    seen = {}

    class Look(Method):
        def forward(self, module, source, target):
            loader = module.trainer.train_dataloader["target"]
            rows = list(range(len(loader.dataset)))
            seen[loader.dataset.transform is None] = [batch.x.features() for batch in loader.plain(rows)]
            assert loader.batch_source is not None

    for augment in ("none", [RandomAffine(180)]):
        fit(folders(tree, augment=augment), small(methods=[Look()]), views=3, folder=str(tmp_path / "c"))
    assert len(seen) == 2
    assert all(torch.allclose(a, b) for a, b in zip(seen[True], seen[False], strict=True))
