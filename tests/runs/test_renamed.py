"""Configs and command lines may contain earlier names of classes and options; a new config gets the current ones."""

import pytest
import yaml

import datamodules
import tl_modules
from tl_modules import load_run
from tl_modules.cli.parser import KNOWN
from tl_modules.runs import renamed
from tl_modules.runs.renamed import CLASSES, DROPPED, OPTIONS, current_args, current_class, current_options

SMALL = "--model.backbone.width 2 --trainer.max_epochs 1 --trainer.limit_train_batches 1 --name x"


def written(folder):
    return yaml.safe_load((folder / "runs/x/version_0/config.yaml").read_text())


@pytest.fixture(autouse=True)
def nothing_said():
    """Each test's warnings are the first ones."""
    renamed.warn.cache_clear()


def told(caplog):
    """The earlier names of which a warning says the current one and the version that drops them."""
    end = f"; version {DROPPED} will not read the old name"
    texts = [r.getMessage() for r in caplog.records if r.name == renamed.__name__ and r.levelname == "WARNING"]
    assert all(text.endswith(end) for text in texts)
    return dict(text.removesuffix(end).split(" is now ") for text in texts)


def test_earlier_names_are_no_known_ones():
    assert not CLASSES.keys() & set(KNOWN)
    assert set(CLASSES.values()) <= set(KNOWN)


def test_the_version_that_drops_them_is_the_next_but_one():
    major, minor, _ = tl_modules.__version__.split(".")
    assert DROPPED in (f"{major}.{int(minor) + 1}", f"{major}.{int(minor) + 2}")


@pytest.mark.parametrize(("name", "current"), [
    ("Full", "FullFineTuning"), ("tl_modules.Full", "tl_modules.FullFineTuning"),
    ("tl_modules.finetuning.freezing.Full", "tl_modules.FullFineTuning"), ("mine.Full", "mine.Full"),
    ("datamodules.shifted.Shifted", "datamodules.SyntheticDomains"), ("torch.nn.Identity", "torch.nn.Identity"),
    ("tl_modules.MCC", "tl_modules.MCC"), ("", ""), ("$Full", "$Full"), ("Full stop.", "Full stop."),
])  # fmt: skip
def test_names_of_classes(name, current):
    assert current_class(name) == current
    package, dot, bare = current.rpartition(".")
    assert (
        not dot
        or package not in ("tl_modules", "datamodules")
        or hasattr({"tl_modules": tl_modules, "datamodules": datamodules}[package], bare)
    )


@pytest.mark.parametrize(("line", "current"), [
    ("fit --select.by few --auto_batch", "fit --selection.criterion few --find_batch_size"),
    ("fit --select.by=few --save_every=5", "fit --selection.criterion=few --save_every_n_steps=5"),
    ("fit --model.init_args.save all --model.save=all", "fit --model.checkpoint_weights all --model.checkpoint_weights=all"),
    ("fit --name auto_batch --model.saved 1 --save", "fit --name auto_batch --model.saved 1 --save"),
])  # fmt: skip
def test_options_of_a_command_line(line, current):
    assert " ".join(current_args(line.split())) == current


@pytest.mark.parametrize(("config", "current"), [
    ({"select": {"by": "few"}}, {"selection": {"criterion": "few"}}),
    ({"select": {"by": "few"}, "selection": {"criterion": "dev"}}, {"selection": {"criterion": "dev"}}),
    ({"auto_batch": True, "save_every": 3}, {"find_batch_size": True, "save_every_n_steps": 3}),
    ({"model": {"class_path": "A", "init_args": {"save": "all"}}},
     {"model": {"class_path": "A", "init_args": {"checkpoint_weights": "all"}}}),
    ({"model": {"save": "all"}}, {"model": {"checkpoint_weights": "all"}}),
])  # fmt: skip
def test_options_of_a_config(config, current):
    assert current_options(config)
    assert config == current


@pytest.mark.parametrize("config", [
    {}, {"select": None}, {"select": [1]}, {"model": "A", "data": {"save": 1, "by": 2}}, {"model": {"init_args": [1]}},
])  # fmt: skip
def test_options_that_are_others_stay(config):
    before = repr(config)
    assert not current_options(config)
    assert repr(config) == before


OLD = """
data:
  class_path: Shifted
  init_args:
    data: {class_path: Digits}
    shifts: {r0: {class_path: Rotation, init_args: {degrees: 0}}, r60: {class_path: Rotation, init_args: {degrees: 6e1}}}
    target: r60
    target_labels: false
select: {by: entropy}
save_every: 3
auto_batch: false
model:
  class_path: Classification
  init_args:
    backbone: {class_path: ConvNet, init_args: {width: 2}}
    finetuning: {class_path: tl_modules.finetuning.freezing.Full, init_args: {lr_decay: 5e-1}}
    methods: [{class_path: DomainBatchNorm}, {class_path: tl_modules.methods.MinimumEntropy, init_args: {weight: 1e-2}}]
    save: all
"""
CURRENT = {
    "Full": "FullFineTuning",
    "DomainBatchNorm": "DSBN",
    "MinimumEntropy": "EntropyMinimization",
    "Shifted": "SyntheticDomains",
}


def test_a_config_of_before(ok, tmp_path, caplog):
    """And the run of it, once more under the names of before, as version 0.1 wrote them: it is tested and resumed."""
    (tmp_path / "old.yaml").write_text(OLD)
    ok("fit -c old.yaml --trainer.max_epochs 1 --name x")
    assert told(caplog) == CURRENT | OPTIONS
    file = tmp_path / "runs/x/version_0/config.yaml"
    text = file.read_text()
    config = yaml.safe_load(text)
    given = config["model"]["init_args"]
    assert (config["selection"], given["checkpoint_weights"]) == ({"criterion": "entropy"}, "all")
    assert given["finetuning"]["class_path"] == "tl_modules.FullFineTuning"
    assert given["finetuning"]["init_args"]["lr_decay"] == 0.5
    assert [method["class_path"] for method in given["methods"]] == [
        "tl_modules.DSBN",
        "tl_modules.EntropyMinimization",
    ]
    assert config["data"]["class_path"] == "datamodules.SyntheticDomains"
    old = text.replace("selection:\n  criterion:", "select:\n  by:").replace("checkpoint_weights:", "save:")
    for before, now in CURRENT.items():
        assert f"modules.{now}\n" in old
        old = old.replace(f"modules.{now}\n", f"modules.{before}\n")
    file.write_text(old)
    for line in ("test --run runs/x", "fit --run runs/x --resume --trainer.max_epochs 2"):
        caplog.clear()
        renamed.warn.cache_clear()
        ok(line)
        found = CURRENT | {name: OPTIONS[name] for name in ("model.save", "select.by")}
        assert told(caplog) == found
    assert type(load_run(tmp_path / "runs/x").finetuning).__name__ == "FullFineTuning"
    resumed = yaml.safe_load(file.read_text())
    assert resumed["trainer"].pop("max_epochs") == 2
    assert config["trainer"].pop("max_epochs") == 1
    assert resumed == config


def test_a_command_line_of_before(ok, tmp_path, caplog):
    names = (
        "--model.finetuning Full --model.save trainable --data.target_labels false --data.source true --select.by last"
    )
    ok(f"fit {SMALL} {names} --save_every 1 --model.methods+=MinimumEntropy --model.methods.weight 0.5")
    left_out = {"auto_batch", "DomainBatchNorm", "Shifted"}
    assert told(caplog) == {name: now for name, now in (CURRENT | OPTIONS).items() if name not in left_out}
    given = written(tmp_path)["model"]["init_args"]
    assert given["methods"][0]["init_args"]["weight"] == 0.5
    assert given["checkpoint_weights"] == "trainable"


@pytest.mark.slow  # it imports everything in a process of its own
def test_a_comparison_of_before(ok, tmp_path):
    words = "--data.target_labels false --data.source true --select.by last --model.finetuning Full"
    grid = {"options": f"{SMALL} {words}".replace(" --name x", ""), "ways": {"a": ""}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(grid))
    ok("compare old.yaml --processes 1")
    (file,) = (tmp_path / "runs/old").rglob("config.yaml")
    config = yaml.safe_load(file.read_text())
    assert config["selection"] == {"criterion": "last"}
    assert config["model"]["init_args"]["finetuning"]["class_path"] == "tl_modules.FullFineTuning"


def test_names_of_now_are_not_warned_of(ok, caplog):
    ok(f"fit {SMALL} --model.finetuning FullFineTuning --model.checkpoint_weights all --save_every_n_steps 1")
    assert told(caplog) == {}


@pytest.mark.parametrize("name", ["Ramp", "tl_modules.Ramp"])
def test_a_weight(name, ok, tmp_path):
    ok(f"fit {SMALL} --data.target_labels true --data.source true --model.target_weight {name}")
    weight = written(tmp_path)["model"]["init_args"]["target_weight"]
    assert weight["class_path"] == "tl_modules.RampWeight"
    ok("test --run runs/x")


@pytest.mark.parametrize("name", ["OptimalTransport", "tl_modules.OptimalTransport"])
def test_a_method(name, ok, tmp_path):
    ok(f"fit {SMALL} --data.source true --model.methods+={name} --model.methods.alpha 0.5")
    (method,) = written(tmp_path)["model"]["init_args"]["methods"]
    assert (method["class_path"], method["init_args"]["alpha"]) == ("tl_modules.DeepJDOT", 0.5)
    assert "train/deepjdot" in (tmp_path / "runs/x/version_0/metrics.csv").read_text()


@pytest.mark.parametrize("module", ["", "datamodules."])
def test_data_and_a_backbone(module, ok, tmp_path):
    (tmp_path / "a.csv").write_text("a,b,y\n" + "".join(f"{n % 5},{n % 7},{'xy'[n % 2]}\n" for n in range(40)))
    backbone = module and "tl_modules."
    ok(
        f"fit --data {module}Tables --data.target a.csv --model.backbone {backbone}VectorBackbone "
        "--model.backbone.widths [3] --trainer.max_epochs 1 --name x"
    )
    config = written(tmp_path)
    assert config["data"]["class_path"] == "datamodules.TabularData"
    assert config["model"]["init_args"]["backbone"]["class_path"] == "tl_modules.TabularMLP"
    assert "--data.test_fraction" in ok("fit --data.help Tables")


def test_nested_ones_in_a_file(ok, tmp_path):
    data = {
        "class_path": "Classes",
        "init_args": {
            "data": {
                "class_path": "Shifted",
                "init_args": {
                    "data": {"class_path": "Digits"},
                    "shifts": {
                        "plain": {"class_path": "Identity"},
                        "turned": {"class_path": "Rotation", "init_args": {"degrees": 9}},
                    },
                    "target": "turned",
                },
            },
            "open_set": False,
        },
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    ok(f"fit -c data.yaml {SMALL}")
    now = written(tmp_path)["data"]
    assert now["class_path"] == "datamodules.ClassSubset"
    assert now["init_args"]["data"]["init_args"]["shifts"]["plain"]["class_path"] == "datamodules.NoShift"


def test_a_torch_class_keeps_its_name(ok, tmp_path):
    ok(f"fit {SMALL} --data.augment+=torch.nn.Identity")
    assert written(tmp_path)["data"]["init_args"]["augment"][0]["class_path"] == "torch.nn.Identity"


def test_a_run_of_before_is_resumed_under_the_present_name(ok, tmp_path):
    ok(f"fit {SMALL} --data.source true --model.methods+=DeepJDOT")
    file = tmp_path / "runs/x/version_0/config.yaml"
    file.write_text(file.read_text().replace("tl_modules.DeepJDOT", "tl_modules.OptimalTransport"))
    ok("fit --run runs/x --resume --trainer.max_epochs 2")
    assert "tl_modules.DeepJDOT" in file.read_text()
    assert [type(method).__name__ for method in load_run(tmp_path / "runs/x").methods] == ["DeepJDOT"]
