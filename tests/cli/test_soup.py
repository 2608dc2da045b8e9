"""`tl soup`: what is averaged, what chooses, and that the result is a run like any other."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything

from datamodules import Digits
from tl_modules import Classification, ConvNet, FullFineTuning, load_run
from tl_modules.checkpoints.files import load_checkpoint
from tl_modules.cli.main import main
from tl_modules.cli.soup import Soup, mixed

QUIET = "--trainer.enable_progress_bar false --trainer.logger false"
FIT = f"fit --data Digits --data.shots_per_class 4 --model.backbone ConvNet --model.backbone.width 2 --trainer.max_epochs 1 {QUIET} "
TUNED = FIT + "--model.backbone.weights runs/start/version_0 --seed_everything "


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """A start, and two runs from it, one of which has moved BatchNorm's statistics too."""
    folder = tmp_path_factory.mktemp("kitchen")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(f"{FIT} --name start".split())
        main(f"{TUNED} 1 --name a --model.finetuning.batch_norm eval".split())
        main(f"{TUNED} 2 --name b --model.finetuning.batch_norm eval".split())
        main(f"{TUNED} 3 --name moved --model.finetuning.batch_norm train".split())
    return folder


@pytest.fixture
def here(kitchen, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for run in (kitchen / "runs").iterdir():
        if run.name in ("start", "a", "b", "moved"):
            (tmp_path / "runs" / run.name).symlink_to(run)
    return tmp_path


def state(name):
    return load_checkpoint(f"runs/{name}/version_0/checkpoints/best.ckpt")["state_dict"]


def table(file):
    with open(file) as stream:
        return list(csv.DictReader(stream))


def test_the_mean_by_hand():
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "same": torch.tensor([0.1])}
    two = {"w": torch.tensor([3.0, -2.0]), "n": torch.tensor(5), "same": torch.tensor([0.1])}
    found = mixed([one, two], [0.75, 0.25])
    assert found["w"].tolist() == [1.5, 1.0]
    assert int(found["n"]) == 3
    assert torch.equal(mixed([one] * 3, [1 / 3] * 3)["same"], one["same"])
    assert found["w"].dtype == torch.float32


def test_wise_ft_is_a_run_half_way(ok, here):
    before = {p: p.read_bytes() for p in here.rglob("runs/a/version_0/*.json")}
    said = ok("soup runs/a --start runs/start --alpha 0.25 --out wise")
    assert "0.25 runs/a" in said
    new, a, start = state("wise"), state("a"), state("start")
    assert new.keys() == a.keys()
    for key in (key for key in new if new[key].is_floating_point()):
        assert torch.allclose(new[key], 0.25 * a[key] + 0.75 * start[key], atol=1e-6), key
    assert any(not torch.equal(a[key], start[key]) for key in a)
    run = Path("runs/wise/version_0")
    metrics = json.loads((run / "metrics.json").read_text())
    assert sum(metrics["soup"].values()) == pytest.approx(1)
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "wise"
    assert {p: p.read_bytes() for p in here.rglob("runs/a/version_0/*.json")} == before
    # everything works on it
    ok(f"test --run runs/wise {QUIET}")
    after = json.loads((run / "metrics.json").read_text())
    assert after["val/accuracy"] == metrics["val/accuracy"]
    assert 0 <= after["test/accuracy"] <= 1
    ok(f"predict --run runs/wise {QUIET}")
    ok(f"benchmark --run runs/wise --batch_sizes [1] --seconds 0.01 {QUIET}")
    ok(f"calibrate --run runs/wise {QUIET}")
    ok(f"{FIT} --model.backbone.weights runs/wise --name next")
    assert Classification(ConvNet(2, weights="runs/wise/version_0"), Digits().schema).head_transferred
    ok("soup runs/wise runs/a --out again")
    assert "temperature" not in load_checkpoint("runs/again/version_0/checkpoints/best.ckpt")


def test_alpha_at_its_ends(ok, here):
    for alpha, name in ((1, "moved"), (0, "start")):  # their BatchNorm's statistics too
        ok(f"soup runs/moved --start runs/start --alpha {alpha} --out end{alpha}")
        new, own = state(f"end{alpha}"), state(name)
        assert all(torch.equal(new[key], own[key]) for key in new if new[key].is_floating_point())


def test_it_goes_where_the_command_line_says(ok, here):
    ok("soup runs/a runs/b --out elsewhere --trainer.default_root_dir other")
    assert Path("other/runs/elsewhere/version_0/checkpoints/best.ckpt").is_file()
    assert not Path("runs/elsewhere").exists()


def test_a_uniform_soup_is_the_mean(ok, here):
    ok("soup runs/a runs/b --how uniform --out both")
    new, a, b = state("both"), state("a"), state("b")
    assert all(torch.allclose(new[k], (a[k] + b[k]) / 2, atol=1e-6) for k in new if new[k].is_floating_point())


def test_greedy_takes_what_harms_nothing(here, monkeypatch):
    monkeypatch.chdir(here)
    a, b, c, d = map(Path, "abcd")
    pot = Soup.__new__(Soup)
    pot.metric, pot.mode = "val/accuracy", "max"
    asked = {(b,): 0.9, (a,): 0.8, (d,): 0.8, (c,): 0.7, (b, a): 0.85, (b, d): 0.9, (b, d, c): 0.95}
    pot.measure = lambda shares: asked[tuple(shares)]
    assert pot.greedy([a, b, c, d]) == {b: 1 / 3, d: 1 / 3, c: 1 / 3}
    pot.mode = "min"
    asked = {(a,): 0.8, (c,): 0.7, (c, a): 0.71}
    assert pot.greedy([a, c]) == {c: 1.0}


def test_statistics_that_moved_are_taken_anew(ok, here):
    """Those of the mean of two networks are not the mean of theirs; those that nobody has moved stay."""
    ok("soup runs/a runs/moved --how uniform --out mixed --trainer.precision 32-true")  # bf16 on some CPUs
    new, a, moved = state("mixed"), state("a"), state("moved")
    keys = [key for key in new if key.endswith(("running_mean", "running_var"))]
    assert keys
    assert not any(torch.equal(a[key], moved[key]) for key in keys)
    assert not any(torch.allclose(new[key], (a[key] + moved[key]) / 2) for key in keys)
    # those of the first layer by hand: the mean over batches of the batch's own
    module = load_run("runs/mixed")
    first = next(m for m in module.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    first.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].mean((0, 2, 3))))
    data = Digits(shots_per_class=4)
    data.collate = module.collate
    with torch.no_grad():
        for batch, *_ in data.train_dataloader():
            module.forward_domains(batch)
    assert torch.allclose(torch.stack(seen).mean(0), first.running_mean, atol=1e-5)

    ok("soup runs/a runs/b --how uniform --out kept")
    assert all(torch.equal(state("kept")[key], a[key]) for key in keys)


def test_a_head_that_was_probed_goes_along_with_its_own_rate(here, monkeypatch):
    """LP-FT with two rates are two runs: the second begins with the head of the first."""
    monkeypatch.chdir(here)
    seed_everything(5, verbose=False)
    data = Digits(shots_per_class=4)
    module = Classification(
        ConvNet(2, weights="runs/start/version_0"),
        data.schema,
        finetuning=FullFineTuning(backbone_lr=0.1),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4),
    )
    assert module.head_transferred
    start = state("start")
    assert all(torch.equal(start[f"head.{key}"], value) for key, value in module.head.state_dict().items())
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(module, data)
    rates = {group["name"]: group["configured_lr"] for group in trainer.optimizers[0].param_groups}
    assert {rate for name, rate in rates.items() if name.startswith("head")} == {1e-4}
    assert all(rate == pytest.approx(1e-5) for name, rate in rates.items() if name.startswith("stage"))


def test_an_ensemble_of_runs(ok, tl, here):
    ok(f"predict --run runs/a --run runs/b --out both.csv {QUIET}")
    ok(f"predict --run runs/a --out a.csv {QUIET}")
    ok(f"predict --run runs/b --out b.csv {QUIET}")
    both, a, b = (table(f"{name}.csv") for name in ("both", "a", "b"))
    assert both[0].keys() - a[0].keys() == {"entropy", "mutual_information"}
    for mean, one, two in list(zip(both, a, b, strict=True))[:20]:
        assert float(mean["p_3"]) == pytest.approx((float(one["p_3"]) + float(two["p_3"])) / 2, abs=2e-6)
    ok(f"test --run runs/a --run runs/b {QUIET}")
    metrics = json.loads(Path("runs/a/version_0/metrics.json").read_text())
    assert "test/deepensemble/accuracy" in metrics
    refused = tl(f"predict --run runs/a --trainer.callbacks+=MCDropout {QUIET}")
    assert refused.code == 2
    assert "callbacks: MCDropout needs dropout" in refused.err


def test_mistakes(tl, ok, here):
    ok(FIT.replace("width 2", "width 4") + "--name wide")
    for line, sentence in (
        ("soup runs/a --out x", "soup: pass two runs or more, or one and --start RUN"),
        ("soup runs/a runs/a --out x", "soup: pass two runs or more"),
        ("soup runs/a runs/b", "missing: soup.out"),
        ("soup runs/a --start runs/start --alpha 2 --out x", "alpha: 2.0 must be in [0, 1]"),
        ("soup runs/a runs/wide --out x", "differ in backbone; use runs of one architecture"),
        ("soup runs/a runs/b --how best --out x", "how: best is not one of"),
    ):
        refused = tl(line)
        assert refused.code == 2, line
        assert sentence in refused.err, refused.err
    assert not Path("runs/x").exists()
