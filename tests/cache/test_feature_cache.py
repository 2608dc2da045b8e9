"""Cached training is uncached training, an entry is never stale, and what cannot be cached is not."""

import csv
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import image, make_tree
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import Dataset

import tl_modules
from datamodules import Digits, ImageFolders, TransferDataModule
from tl_modules import (
    Classification,
    ConvNet,
    FineTuning,
    GradualUnfreezing,
    LastStages,
    Method,
    UserError,
)
from tl_modules.batch.cached import CachedActivations
from tl_modules.cache import FeatureCache, fingerprints
from tl_modules.cache.store import Store
from tl_modules.runs.directory import read_config

STRATEGIES = {
    "FeatureExtraction": "",
    "LastStages": "--model.finetuning.k 1",
    "GradualUnfreezing": "--model.finetuning.every 2",
    "GradualUnfreezing:steps": "--model.finetuning.every 15 --model.finetuning.unit steps",
    "GradualUnfreezing:fraction": "--model.finetuning.every 0.4 --model.finetuning.unit fraction",
    "FreezeThenUnfreeze": "--model.finetuning.after 2",
}
OPEN_FROM_THE_INPUT = {"Full", "FirstStages", "BitFit", "NormOnly"}
# in double precision: LayerNorm behind four features that hardly differ makes any rounding large
RUN = (
    "fit --data Digits --trainer.max_epochs 4 --trainer.precision 64-true --trainer.logger false --model.backbone.width 4 "
    "--data.batch_size 48 --cache.folder cache --model.optimizer torch.optim.SGD --model.optimizer.lr 0.05 "
)


@pytest.fixture
def said(caplog):
    """What the cache has said since it was last asked."""
    caplog.set_level(logging.INFO, "tl_modules")

    def call():
        texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("cache: ")]
        caplog.clear()
        return texts

    return call


RUNS = "the frozen stages run in every epoch"


def curve(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_every_strategy_has_a_case():
    named = {k for k, c in vars(tl_modules).items() if isinstance(c, type) and issubclass(c, FineTuning)}
    assert named - {"FineTuning"} <= {name.partition(":")[0] for name in STRATEGIES} | OPEN_FROM_THE_INPUT


@pytest.mark.parametrize("strategy", sorted(OPEN_FROM_THE_INPUT))
def test_nothing_is_cached_of_what_trains_from_the_input_on(strategy, said):
    fit(Digits(), Classification(ConvNet(4), 10, finetuning=getattr(tl_modules, strategy)()))
    assert said() == []


@pytest.mark.parametrize(("strategy", "data"), [
    *((name, "") for name in STRATEGIES),
    *((name, "--data.source true") for name in ("FeatureExtraction", "LastStages", "GradualUnfreezing")),
])  # fmt: skip
def test_cached_training_is_uncached_training(strategy, data, ok, said, tmp_path):
    line = f"{RUN} --model.finetuning {strategy.partition(':')[0]} {STRATEGIES[strategy]} {data} "
    ok(line + "--name off --cache.enabled false")
    assert said() == [f"cache: {RUNS}: --cache.enabled is false"]
    ok(line + "--name on")
    first = said()
    ok(line + "--name again")
    again = said()
    assert any("train: features cached in" in t or "train: what leaves" in t for t in first), first
    assert any(t.startswith("cache: val: ") for t in first)
    again = [t for t in again if "fewer than two epochs" not in t]
    assert again
    assert all("of an earlier run" in t for t in again), again
    off, on, more = (curve(tmp_path / "runs" / n / "version_0") for n in ("off", "on", "again"))
    assert on == more
    for one, two in zip(off, on, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], abs=1e-5), key


def fit(data, module, epochs=2, **options):
    seed_everything(0)
    cache = FeatureCache(**options)
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[cache]
    )
    trainer.fit(module, data)
    return trainer


def small(strategy="FeatureExtraction", **options):
    torch.manual_seed(0)
    return Classification(ConvNet(4), 3, finetuning=getattr(tl_modules, strategy)(), **options)


def folders(tree, **options):
    return ImageFolders(tree, image_size=32, num_workers=0, batch_size=8, **options)


def reused(said, tree, folder, module=None, **options):
    fit(folders(tree, **options), module or small(), folder=str(folder))
    return [text.split(":")[1].strip() for text in said() if "of an earlier run" in text]


def test_a_signal_does_not_wait_for_an_entry(tl, said, tmp_path, monkeypatch):
    (tmp_path / "preempted.py").write_text(
        "import os, signal\nfrom datamodules import Digits\nfrom datamodules.splits import Rows\n"
        "class Signals(Rows):\n"
        "    def __getitem__(self, index):\n"
        "        if not os.path.exists('sent') and index == 100:\n"
        "            open('sent', 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().__getitem__(index)\n"
        "    def fingerprint(self):\n"
        "        return 'x'\n"
        "class Preempted(Digits):\n"
        "    def domains(self, split):\n"
        "        found = super().domains(split)\n"
        "        return {'target': Signals(found['target'], range(len(found['target'])))} if split == 'train' else found\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = RUN.replace("--data Digits", "--data preempted.Preempted") + "--model.finetuning FeatureExtraction --name x"
    result = tl(line)
    assert result.code == 143
    assert "Traceback" not in result.err
    assert "a signal asks to stop" in " ".join(said())
    assert not list((tmp_path / "cache").glob(".*.part"))
    assert tl("fit --run runs/x --resume --trust preempted").code == 0
    assert curve(tmp_path / "runs" / "x" / "version_0")[-1]["epoch"] == 3


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
    """A transform of one's own; its repr says nothing of `by`."""

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
        assert any("an entry serves this run only: a Generator has no name" in text for text in said())
    assert not list(there.glob("*/meta.json"))


def test_a_killed_build_blocks_nobody(tree, tmp_path, said, monkeypatch):
    """Process ids repeat in containers; what a killed run has left there belongs to nobody."""
    there = tmp_path / "cache"
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def killed(*_):
        raise ChildProcessError

    with monkeypatch.context() as death:
        death.setattr(Store, "commit", killed)
        death.setattr(Store, "drop", lambda *_: None)
        with pytest.raises(ChildProcessError):
            fit(folders(tree), small(), folder=str(there))
    assert list(there.glob(".*.part"))
    said()
    assert reused(said, tree, there) == []
    assert reused(said, tree, there) == ["val", "target train"]


def test_a_line_says_once_why_the_cache_is_off(tree, tmp_path, said):
    class Reader(Method):
        reads_x = True

        def forward(self, module, source, target):
            return None

    reasons = {
        "--cache.enabled is false": (small(), {"enabled": False}),
        "Reader looks at the input": (small(methods=[Reader()]), {}),
    }
    for reason, (module, options) in reasons.items():
        fit(folders(tree), module, epochs=3, folder=str(tmp_path / "c"), **options)
        assert said() == [f"cache: {RUNS}: {reason}"]
    fit(folders(tree), small(), epochs=1, folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: fewer than two epochs would read an entry"]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 3))
    fit(data, small(), folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: the loaders are not those of a TransferDataModule"]


def test_a_compiled_backbone_has_a_compiled_tail():
    from tl_modules.cache.cut import cut

    backbone = ConvNet(4)
    assert cut(backbone, 1).tail._compiled_call_impl is None
    backbone.compile(backend="eager")
    assert cut(backbone, 1).tail._compiled_call_impl is not None


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


def test_augmentation_runs_in_every_epoch_unless_views_are_asked_for(tree, tmp_path, said):
    from torchvision.transforms.v2 import RandomHorizontalFlip

    def run(**options):
        fit(folders(tree, augment=[RandomHorizontalFlip()]), small(), folder=str(tmp_path / "c"), **options)
        return said()

    assert any("augmentation changes what the frozen stages see" in text for text in run())
    texts = run(views=3)
    assert any("target train: features cached" in text for text in texts)


def test_views_are_views_of_each_sample(tmp_path):
    from torchvision.transforms.v2 import RandomAffine

    seen = {}

    class Look(Method):
        def forward(self, module, source, target):
            for row, y in zip(target.features.detach(), target.y, strict=True):
                seen.setdefault(int(y), set()).add(tuple(row.tolist()))

    tree = make_tree(tmp_path / "t", (("train", 2), ("val", 2)))
    data = folders(tree, augment=[RandomAffine(180)])
    fit(data, small(methods=[Look()]), epochs=30, views=3, folder=str(tmp_path / "c"))
    assert all(len(rows) == 6 for rows in seen.values())  # two images of each class, three views of each


def test_an_entry_can_be_stored_in_half_precision(tree, tmp_path, said):
    whole, half = tmp_path / "whole", tmp_path / "half"
    fit(folders(tree), small("LastStages"), folder=str(whole))
    fit(folders(tree), small("LastStages"), folder=str(half), dtype="float16")
    sizes = [sum(f.stat().st_size for f in d.rglob("0.bin")) for d in (whole, half)]
    assert sizes[0] == 2 * sizes[1]


def test_training_never_sees_labels_that_are_hidden(tmp_path):
    seen = []

    class Look(Method):
        def forward(self, module, source, target):
            seen.append((type(target.x), target.y))

    module = Classification(ConvNet(4), 10, finetuning=tl_modules.FeatureExtraction(), methods=[Look()])
    fit(Digits(source=True), module, folder=str(tmp_path / "c"))
    assert set(seen) == {(CachedActivations, None)}


def test_a_method_that_reads_x_gets_it(tree, tmp_path, said):
    class Reads(Method):
        def forward(self, module, source, target):
            return target.x.float().mean() * 0 + target.output.sum()

    with pytest.raises(UserError, match="let the method say `reads_x = True`"):
        fit(folders(tree), small(methods=[Reads()]), folder=str(tmp_path / "c"))
    Reads.reads_x = True
    said()
    fit(folders(tree), small(methods=[Reads()]), folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: Reads looks at the input"]

    class Uses(Method):
        def forward(self, module, source, target):
            return torch.mean(target.x) * 0

    with pytest.raises(UserError, match="mean is asked of x, but x was not read"):
        fit(folders(tree), small(methods=[Uses()]), folder=str(tmp_path / "c"))


def test_a_step_of_ones_own_gets_x(tree, tmp_path, said):
    class Own(Classification):
        def training_step(self, batch, batch_idx):
            assert isinstance(batch["target"][0], torch.Tensor)
            return super().training_step(batch, batch_idx)

    fit(folders(tree), Own(ConvNet(4), 3, finetuning=tl_modules.FeatureExtraction()), folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: Own has a training_step of its own, which may look at the input"]


def test_a_single_pass_is_not_cached(tree, tmp_path, said):
    short = f"cache: {RUNS}: fewer than two epochs would read an entry"
    fit(folders(tree), small(), epochs=1, folder=str(tmp_path / "c"))
    assert said() == [short]
    trainer = Trainer(
        max_epochs=3, limit_train_batches=1, limit_val_batches=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[FeatureCache(folder=str(tmp_path / "c"))],
    )  # fmt: skip
    data = folders(tree)
    data.batch_size = 2
    trainer.fit(small(), data)
    assert said() == [short]


class Noisy(Dataset):
    """Draws on its own."""

    targets = np.arange(12) % 3

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(3, 8, 8), int(self.targets[index])


class Quiet(Noisy):
    def __getitem__(self, index):
        return torch.full((3, 8, 8), index / 12), int(self.targets[index])


class Own(TransferDataModule):
    num_outputs, class_names = 3, None

    def __init__(self, dataset):
        super().__init__(batch_size=4)
        self.dataset = dataset

    def domains(self, split):
        return {"target": self.dataset}


def test_data_that_cannot_name_themselves_are_cached_for_one_run(tmp_path, said):
    folder = tmp_path / "c"
    for _ in range(2):
        fit(Own(Quiet()), small(), folder=str(folder))
        assert sum("features cached" in text for text in said()) == 2
    assert list(folder.iterdir()) == []


def test_data_that_draw_random_numbers_are_not_cached(tmp_path, said, monkeypatch):
    from tl_modules.cache import entry

    asked, check = [], entry._check_deterministic
    monkeypatch.setattr(entry, "_check_deterministic", lambda *args: (asked.append(args), check(*args)))
    fit(Own(Noisy()), small(), epochs=4, folder=str(tmp_path / "c"))
    assert all("the data set draws random numbers of its own" in text for text in said())
    assert len(asked) == 2  # of training and validation, not of each epoch


def test_without_a_disk_there_is_the_memory(tree, tmp_path, said):
    (tmp_path / "file").write_text("")
    fit(folders(tree), small(), folder=str(tmp_path / "file" / "c"))
    assert sum("features cached" in text for text in said()) == 2


def test_without_room_the_stages_run(tree, tmp_path, said, monkeypatch):
    monkeypatch.setattr("tl_modules.cache.entry.free_memory", lambda: 0)
    trainer = fit(folders(tree), small(), folder=str(tmp_path / "c"), disk_gb=1e-9)
    assert any("more than --cache.disk_gb" in text for text in said())
    assert trainer.current_epoch == 2


def test_an_entry_is_the_same_whenever_it_is_built(tree, tmp_path):
    for name in ("one", "two"):
        fit(folders(tree), small("LastStages"), folder=str(tmp_path / name))
    files = [
        {f.relative_to(tmp_path / n): f.read_bytes() for f in (tmp_path / n).rglob("*.bin")} for n in ("one", "two")
    ]
    assert len(files[0]) == 4
    assert files[0] == files[1]


def test_a_damaged_entry_is_made_anew(tree, tmp_path, said):
    there = tmp_path / "cache"
    reused(said, tree, there)
    for file in there.rglob("0.bin"):
        file.write_bytes(b"\1" * file.stat().st_size)
    assert reused(said, tree, there) == []
    assert reused(said, tree, there) == ["val", "target train"]


def test_a_backbone_that_cannot_be_cut_trains_all_the_same(tree, tmp_path, said):
    class Depends(ConvNet):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(x + 1)

    def run(strategy):
        fit(folders(tree), Classification(Depends(4), 3, finetuning=strategy), folder=str(tmp_path / "c"))
        return said()

    assert any("the frozen stages run in every epoch: torch.fx cannot" in text for text in run(LastStages(1)))
    assert any("features cached" in text for text in run(tl_modules.FeatureExtraction()))


def test_test_data_are_cached_for_the_next_head(ok, said):
    ok(RUN + "--model.finetuning FeatureExtraction --name x")
    said()
    ok("test --run runs/x --cache.folder cache")
    ok("test --run runs/x --cache.folder cache")
    first, second = said()
    assert first.startswith("cache: test: features cached")
    assert "of an earlier run" in second


@pytest.mark.tensorboard
def test_pictures_show_what_was_not_read(ok, tmp_path):
    ok(RUN.replace("--trainer.logger false", "") + "--model.finetuning FeatureExtraction --name x")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs/x/version_0"), {"images": 0})
    events.Reload()
    assert {"inputs/target", "val/worst: true, predicted, loss"} <= set(events.Tags()["images"])


@pytest.mark.parametrize(("options", "text"), [
    ("--cache.views -1", "views: -1 must not be negative"),
    ("--cache.disk_gb 0", "disk_gb: 0.0 must be above 0"),
    ("--cache.dtype int8", "cache.dtype"),
])  # fmt: skip
def test_mistakes(options, text, tl):
    result = tl(RUN + options)
    assert result.code == 2
    assert text in result.err
    assert "Traceback" not in result.err


def test_gradual_unfreezing_moves_the_boundary(tmp_path, said):
    module = Classification(ConvNet(4), 10, finetuning=GradualUnfreezing(2))
    fit(Digits(), module, epochs=8, folder=str(tmp_path / "c"))
    texts = [text.split(" cached")[0] for text in said() if "train" in text]
    assert texts == [f"cache: target train: {w}" for w in ("features", "what leaves stage_1", "what leaves stage_0")]


def test_a_cached_batch_is_no_tensor():
    cached = Cached((torch.ones(2, 3),), lambda features: features, lambda count: torch.zeros(count))
    assert len(cached) == 2
    assert torch.equal(cached.features(), torch.ones(2, 3))
    assert isinstance(cached.to(torch.device("cpu")), Cached)
    with pytest.raises(UserError, match=r"x.shape is asked for"):
        _ = cached.shape


def test_a_run_of_somebody_else_does_not_say_what_to_empty(ok, said, tmp_path):
    ok(RUN + "--model.finetuning FeatureExtraction --name x --cache.dtype bfloat16")
    shutil.rmtree(tmp_path / "cache")
    ok("test --run runs/x")
    assert not (tmp_path / "cache").exists()
    assert read_config(tmp_path / "runs/x/version_0")["cache"] == {"enabled": True, "views": 0, "dtype": "bfloat16"}
