"""What is cached and what is not, and why not; what a signal, a full disk or a damaged entry does."""

import os
import shutil

import numpy as np
import pytest
import torch
from cache_runs import RUN, RUNS, curve, fit, folders, reused, small
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

import tl_modules
from datamodules import Digits, TransferDataModule
from tl_modules import Classification, ConvNet, LastStages, Method, UserError
from tl_modules.batch.cached import CachedActivations
from tl_modules.cache import FeatureCache
from tl_modules.cache.store import Store
from tl_modules.runs.directory import read_config


def test_a_signal_does_not_wait_for_an_entry(tl, said, tmp_path, monkeypatch):
    (tmp_path / "preempted.py").write_text(
        "import os, signal\nfrom datamodules import Digits\nfrom datamodules.splits import Subset\n"
        "class Signals(Subset):\n"
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
    assert "a signal asks the run to stop" in " ".join(said())
    assert not list((tmp_path / "cache").glob(".*.part"))
    assert tl("fit --run runs/x --resume --trust preempted").code == 0
    assert curve(tmp_path / "runs" / "x" / "version_0")[-1]["epoch"] == 3


def test_a_killed_build_blocks_nobody(tree, tmp_path, said, monkeypatch):
    """Process ids repeat in containers; files left by a killed run belong to nobody."""
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
        needs_raw_input = True

        def forward(self, module, source, target):
            return None

    reasons = {
        "--cache.enabled is false": (small(), {"enabled": False}),
        "Reader reads the input": (small(methods=[Reader()]), {}),
    }
    for reason, (module, options) in reasons.items():
        fit(folders(tree), module, epochs=3, folder=str(tmp_path / "c"), **options)
        assert said() == [f"cache: {RUNS}: {reason}"]
    fit(folders(tree), small(), epochs=1, folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: fewer than two epochs would read an entry"]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 3))
    fit(data, small(), folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: the loaders do not come from a TransferDataModule"]


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


def test_a_method_that_needs_raw_input_gets_it(tree, tmp_path, said):
    class Reads(Method):
        def forward(self, module, source, target):
            return target.x.float().mean() * 0 + target.output.sum()

    with pytest.raises(UserError, match="set `needs_raw_input = True` in the method"):
        fit(folders(tree), small(methods=[Reads()]), folder=str(tmp_path / "c"))
    Reads.needs_raw_input = True
    said()
    fit(folders(tree), small(methods=[Reads()]), folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: Reads reads the input"]

    class Uses(Method):
        def forward(self, module, source, target):
            return torch.mean(target.x) * 0

    with pytest.raises(UserError, match="mean cannot use x: x was not read"):
        fit(folders(tree), small(methods=[Uses()]), folder=str(tmp_path / "c"))


def test_a_step_of_ones_own_gets_x(tree, tmp_path, said):
    class Own(Classification):
        def training_step(self, batch, batch_idx):
            assert isinstance(batch["target"][0], torch.Tensor)
            return super().training_step(batch, batch_idx)

    fit(folders(tree), Own(ConvNet(4), 3, finetuning=tl_modules.FeatureExtraction()), folder=str(tmp_path / "c"))
    assert said() == [f"cache: {RUNS}: Own overrides training_step, which may read the input"]


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
    assert all("the data set draws unseeded random numbers" in text for text in said())
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
    class Average(torch.nn.Module):
        def forward(self, x):
            return x - x.mean(0)  # a sample's entry depends on the others

    def model():
        made = ConvNet(4)
        made.model[0].append(Average())
        return made

    def run(strategy):
        fit(folders(tree), Classification(model(), 3, finetuning=strategy), folder=str(tmp_path / "c"))
        return said()

    for strategy in (LastStages(1), tl_modules.FeatureExtraction()):
        assert any(
            "run in every epoch: a sample's features differ alone and in a batch" in text for text in run(strategy)
        )


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


def test_a_run_of_somebody_else_does_not_say_what_to_empty(ok, said, tmp_path):
    ok(RUN + "--model.finetuning FeatureExtraction --name x --cache.dtype bfloat16")
    shutil.rmtree(tmp_path / "cache")
    ok("test --run runs/x")
    assert not (tmp_path / "cache").exists()
    assert read_config(tmp_path / "runs/x/version_0")["cache"] == {"enabled": True, "views": 0, "dtype": "bfloat16"}
