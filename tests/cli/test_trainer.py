"""What our Trainer adds: `tl embed`, `tl benchmark`, and hooks that cost less and do the same."""

import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from safetensors.torch import load_file

from datamodules import Digits
from tl_modules import Classification, ConvNet, load_run
from tl_modules.batch.compat import STEP_HOOKS, RunCheckpoint
from tl_modules.cli.precision import best_precision
from tl_modules.cli.trainer import TransferTrainer

FIT = (
    "fit --trainer.max_epochs 1 --model.backbone.width 4 --data.shots_per_class 2 --trainer.precision 32-true --name x "
)


def rows(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_embed_a_run(kind, ok, tmp_path):
    ok(FIT)
    said = ok(f"embed --run runs/x --out e --format {kind} --data.source true")
    index = rows(tmp_path / "e" / "index.csv")
    features = (
        torch.from_numpy(np.load(tmp_path / "e" / "features.npy"))
        if kind == "npy"
        else load_file(tmp_path / "e" / "features.safetensors")["features"]
    )
    assert f"{len(index):,} samples, 16 features each" in said
    assert [int(row["row"]) for row in index] == list(range(len(features)))
    assert {(r["domain"], r["split"]) for r in index} == {
        (d, s) for d in ("source", "target") for s in ("train", "val", "test")
    }
    data, backbone = Digits(source=True), load_run("runs/x").backbone
    for domain, split in (("source", "val"), ("target", "test")):
        dataset = data.domains(split)[domain]
        own = [r for r in index if (r["domain"], r["split"]) == (domain, split)]
        assert [int(r["label"]) for r in own] == dataset.targets.tolist()
        with torch.inference_mode():
            expected = backbone(dataset.images)
        torch.testing.assert_close(features[int(own[0]["row"]) :][: len(own)], expected, rtol=1e-4, atol=1e-4)


def test_embed_a_pretrained_backbone_without_a_run(ok, tree, tmp_path):
    ok(
        "embed --model Classification --model.backbone ConvNet --model.backbone.width 4 --data ImageFolders "
        f"--data.target {tree} --data.image_size 32 --data.num_workers 0 --out e"
    )
    index = rows(tmp_path / "e" / "index.csv")
    assert len(index) == 36  # without a test folder the validation images are those of the test, once
    assert {row["label"] for row in index} == {"blue", "green", "red"}
    assert all((tree / row["id"]).is_file() for row in index)


def test_embed_says_where_it_cannot_write(ok, tl, tmp_path):
    ok(FIT)
    (tmp_path / "file").write_text("")
    result = tl("embed --run runs/x --out file/e")
    assert result.code == 2
    assert "out: file/e cannot be written" in result.err


def test_benchmark(ok, tl, tmp_path):
    ok(FIT)
    said = ok("benchmark --run runs/x --batch_sizes [1,4] --seconds 0.05")
    found = json.loads((tmp_path / "runs/x/version_0/benchmark.json").read_text())
    module = load_run("runs/x")
    assert found["parameters"] == sum(p.numel() for p in module.parameters())
    assert f"{found['parameters']:,} parameters" in said
    shapes = zip([3, 4, 4, 8, 8, 16], [4, 4, 8, 8, 16, 16], [784, 784, 196, 196, 49, 49], strict=True)
    assert found["macs"] == sum(9 * i * o * pixels for i, o, pixels in shapes) + 16 * 10
    assert found["file"] == (tmp_path / "runs/x/version_0/checkpoints/best.ckpt").stat().st_size
    assert set(found["eager"]) == {"1", "4"}
    for row in found["eager"].values():
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert row["memory"] > 0
    result = tl("benchmark --run runs/x --batch_sizes [0]")
    assert result.code == 2
    assert "batch_sizes: [0] must be at least 1 each" in result.err
    assert "run: `tl benchmark` needs a trained model" in tl("benchmark").err


class Witness(Callback):
    """Notes each hook and the name under which the module may log in it."""

    def __init__(self):
        self.seen = []
        self.on_after_backward = lambda trainer, module: self.note(module)

    def note(self, module, *args):
        self.seen.append(module._current_fx_name)

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.note(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, *args):
        self.note(pl_module)


@pytest.mark.parametrize("profiler", [PassThroughProfiler, SimpleProfiler])
def test_hooks_reach_the_callbacks_that_have_them(profiler):
    witness = Witness()
    trainer = TransferTrainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        profiler=profiler(), callbacks=[Callback(), witness], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(Classification(ConvNet(4), 10), Digits())
    assert witness.seen == ["on_train_batch_start", "on_after_backward", "on_before_optimizer_step"] * 2
    assert set(witness.seen) < set(STEP_HOOKS)
    if profiler is SimpleProfiler:
        assert any("Witness" in name for name in trainer.profiler.recorded_durations)


def test_precision_is_what_machine_and_backbone_gain_by(monkeypatch):
    from tl_modules import TorchvisionBackbone

    plain, grouped = Classification(ConvNet(4), 10), Classification(TorchvisionBackbone("shufflenet_v2_x0_5"), 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert best_precision(plain) == best_precision(plain, "cpu") == ("bf16-mixed" if has else "32-true")
        assert best_precision(grouped) == "32-true"
        assert best_precision(plain, "tpu") == "32-true"
        assert best_precision(torch.nn.Linear(1, 1)) == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert best_precision(grouped) == best_precision(plain, "gpu") == ("bf16-mixed" if has else "32-true")


@pytest.mark.parametrize("asked", ["", "--trainer.precision 32-true"])
def test_the_run_says_its_precision(asked, ok, tmp_path, monkeypatch):
    import yaml

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    ok(f"fit --trainer.max_steps 1 --trainer.limit_val_batches 1 --data.shots_per_class 1 --name x {asked}")
    config = yaml.safe_load((tmp_path / "runs/x/version_0/config.yaml").read_text())
    assert config["trainer"]["precision"] == ("32-true" if asked else "bf16-mixed")


def test_head_and_losses_keep_their_digits():
    seen = []

    class Look(Classification):
        def loss(self, out):
            seen.append((out.output.dtype, torch.is_autocast_enabled("cpu")))
            return super().loss(out)

    trainer = TransferTrainer(max_steps=1, precision="bf16-mixed", logger=False, enable_checkpointing=False,
                              enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(Look(ConvNet(4), 10), Digits())
    assert seen == [(torch.float32, False)]


@pytest.mark.parametrize(("optimizer", "expected"), [
    (torch.optim.AdamW, True),
    (torch.optim.SGD, True),
    (lambda p: torch.optim.AdamW(p, foreach=True), None),
    (lambda p: torch.optim.AdamW(p, fused=False), None),
    (torch.optim.RMSprop, None),
])  # fmt: skip
def test_optimizers_are_fused_where_they_can_be(optimizer, expected):
    module = Classification(ConvNet(4), 10, optimizer=optimizer)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {bool(group.get("fused")) for group in groups} == {bool(expected)}


@pytest.mark.parametrize("options", ["", "--trainer.callbacks.monitor val/accuracy --trainer.callbacks.mode max"])
def test_a_checkpoint_callback_of_ones_own_may_equal_ours(ok, tmp_path, options):
    fit = f"fit --data Digits --trainer.limit_train_batches 2 --trainer.callbacks+=ModelCheckpoint {options}"
    ok(f"{fit} --trainer.max_epochs 1 --name a")
    kept = {file.name for file in (tmp_path / "runs/a/version_0/checkpoints").iterdir()}
    assert {"best.ckpt", "last.ckpt", "epoch=0-step=2.ckpt"} <= kept
    ok("fit --run runs/a --resume --trainer.max_epochs 2")
    states = torch.load(tmp_path / "runs/a/version_0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert {"RunCheckpoint best", "RunCheckpoint last"} <= states.keys()
    assert sum(key.startswith("ModelCheckpoint") for key in states) == 1


def test_states_of_earlier_checkpoints_are_found():
    monitor = {"monitor": "val/accuracy", "mode": "max", "filename": "best"}
    assert RunCheckpoint(**monitor)._legacy_state_key == ModelCheckpoint(**monitor).state_key


@pytest.mark.parametrize("command", ["test", "fit --resume"])
def test_a_run_that_cannot_be_written(ok, tl, monkeypatch, command):
    ok("fit --data Digits --trainer.max_epochs 1 --trainer.limit_train_batches 1 --name a")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    result = tl(f"{command} --run runs/a")
    assert result.code == 2
    assert "runs/a/version_0 cannot be written; work on a copy of it" in result.err
