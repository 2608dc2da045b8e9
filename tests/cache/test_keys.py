"""An entry is never stale: whatever its contents depend on changes its name."""

import os

import torch
from cache_runs import fit, folders, reused, small
from conftest import image, make_tree

import tl_modules
from tl_modules import Classification, ConvNet
from tl_modules.cache import fingerprints


def test_whatever_changes_misses(tmp_path, said):
    tree = make_tree(tmp_path / "tree", suffix="bmp")  # whose files are all of one size
    there = tmp_path / "cache"
    assert reused(said, tree, there) == []
    assert reused(said, tree, there) == ["val", "target train"]

    changed = tree / "train" / "red" / "0.bmp"
    before = changed.stat()
    image(changed, (90, 10, 90), seed=5)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (changed.stat().st_size, changed.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert reused(said, tree, there) == ["val"]
    image(tree / "val" / "red" / "extra.bmp", (200, 0, 0))
    assert reused(said, tree, there) == ["target train"]
    assert reused(said, tree, there, shots_per_class=2) == ["val"]

    weights = small()
    with torch.no_grad():
        weights.backbone.model[0][0].weight[0, 0, 0, 0] += 1e-3
    assert reused(said, tree, there, weights) == []
    buffers = small()
    buffers.backbone.model[2][1].running_mean += 1e-3
    assert reused(said, tree, there, buffers) == []
    shift = small()
    shift.backbone.mean += 0.01
    assert reused(said, tree, there, shift) == []
    assert reused(said, tree, there) == ["val", "target train"]


class Scaled(ConvNet):
    """Has what no state dict holds: a plain attribute, a buffer that is not persistent, and a function."""

    def __init__(self, width, factor=1.0, offset=0.0, function=torch.abs):
        super().__init__(width)
        self.factor, self.function = factor, function
        self.register_buffer("offset", torch.tensor(offset), persistent=False)

    def forward(self, x):
        return self.function(super().forward(x)) * self.factor + self.offset


def test_what_no_state_dict_holds_misses(tree, tmp_path, said):
    there = tmp_path / "cache"

    def again(**options):
        torch.manual_seed(0)
        module = Classification(Scaled(4, **options), 3, finetuning=tl_modules.FeatureExtraction())
        return reused(said, tree, there, module)

    assert again() == []
    assert again() == ["val", "target train"]
    assert again(factor=2.0) == []
    assert again(offset=1.0) == []
    assert again(function=torch.relu) == []
    assert again() == ["val", "target train"]


class Brighter(torch.nn.Module):
    """A user's transform, whose repr does not contain `by`."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, image):
        return (image.float() + self.by).clamp(0, 255).to(torch.uint8)


def test_the_arguments_of_ones_own_transform_are_in_the_key(tree, tmp_path, said):
    there = tmp_path / "cache"

    def again(by):
        fit(folders(tree, augment=[Brighter(by)]), small(), folder=str(there), views=1)
        return sum("target train: features of an earlier run" in text for text in said())

    assert repr(Brighter(1)) == repr(Brighter(2))
    assert [again(by) for by in (1, 1, 2, 2)] == [0, 1, 0, 1]


def test_what_has_no_name_serves_one_run(tree, tmp_path, said):
    there = tmp_path / "cache"

    def module():
        made = small()
        made.backbone.random_generator = torch.Generator()
        return made

    for _ in range(2):
        fit(folders(tree), module(), folder=str(there))
        assert any("an entry is for this run only: a Generator cannot be named" in text for text in said())
    assert not list(there.glob("*/meta.json"))


def test_code_precision_and_boundary_are_in_the_key(tree, tmp_path, said, monkeypatch):
    there = tmp_path / "cache"
    assert reused(said, tree, there) == []
    assert reused(said, tree, there, small("LastStages")) == []
    from tl_modules.cache import feature_cache

    with monkeypatch.context() as other:
        other.setattr(feature_cache.torch, "__version__", "0.0")
        assert reused(said, tree, there) == []

    class Mine(ConvNet):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    mine = Classification(Mine(4), 3, finetuning=tl_modules.FeatureExtraction())
    assert reused(said, tree, there, mine) == []
    assert reused(said, tree, there) == ["val", "target train"]


def test_what_the_key_cannot_know_is_noticed(tree, tmp_path, said, monkeypatch):
    there = tmp_path / "cache"
    assert reused(said, tree, there) == []
    from tl_modules.cache import feature_cache

    monkeypatch.setattr(feature_cache, "named", lambda backbone, *others, without: fingerprints.named(*others))
    assert reused(said, tree, there) == []

    class Helper(ConvNet):
        def preprocess(self, images):
            return -super().preprocess(images)

    torch.manual_seed(0)
    assert reused(said, tree, there) == ["val", "target train"]
    changed = Classification(Helper(4), 3, finetuning=tl_modules.FeatureExtraction())
    assert reused(said, tree, there, changed) == []


def test_code_without_a_file_serves_one_run(tree, tmp_path, said):
    space = {"ConvNet": ConvNet, "__name__": "nowhere"}
    exec("class Interactive(ConvNet):\n    pass", space)
    for _ in range(2):
        torch.manual_seed(0)
        module = Classification(space["Interactive"](4), 3, finetuning=tl_modules.FeatureExtraction())
        assert reused(said, tree, tmp_path / "cache", module) == []


def test_only_the_weights_below_the_boundary_count(tree, tmp_path, said):
    there = tmp_path / "cache"
    assert reused(said, tree, there, small("LastStages")) == []
    above = small("LastStages")
    with torch.no_grad():
        above.backbone.model[2][0].weight += 1
    assert reused(said, tree, there, above) == ["val", "target train"]
