"""A config may hold an earlier name of a class; what is written then has the present one."""

import pytest
import yaml

from tl_modules.cli.parser import EARLIER, KNOWN

SMALL = "--model.backbone.width 2 --trainer.max_epochs 1 --trainer.limit_train_batches 1 --name x"


def written(folder):
    return yaml.safe_load((folder / "runs/x/version_0/config.yaml").read_text())


def test_earlier_names_are_no_known_ones():
    assert {"Schedule", "Ramp", "Linear"} <= EARLIER.keys()
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
