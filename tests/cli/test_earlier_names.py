"""A config may contain an earlier name of a class; a new config gets the current one."""

import pytest
import yaml

from tl_modules import load_run
from tl_modules.cli.parser import EARLIER, KNOWN

SMALL = "--model.backbone.width 2 --trainer.max_epochs 1 --trainer.limit_train_batches 1 --name x"


def written(folder):
    return yaml.safe_load((folder / "runs/x/version_0/config.yaml").read_text())


def test_earlier_names_are_no_known_ones():
    assert EARLIER == {
        "Classes": "ClassSubset",
        "Colour": "SpuriousColour",
        "HubBackbone": "TorchHubBackbone",
        "Identity": "NoShift",
        "Linear": "LinearWeight",
        "OptimalTransport": "DeepJDOT",
        "Ramp": "RampWeight",
        "Schedule": "WeightSchedule",
        "Tables": "TabularData",
        "VectorBackbone": "TabularMLP",
    }
    assert not EARLIER.keys() & set(KNOWN)
    assert set(EARLIER.values()) <= set(KNOWN)


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
