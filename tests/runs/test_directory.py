"""Runs of earlier versions are read as they were meant."""

import pytest
import yaml

from tl_modules.runs.directory import read_config


def test_what_a_method_no_longer_takes_is_left_out(tmp_path):
    methods = [
        {"class_path": "tl_modules.GroupDRO", "init_args": {"weight": 1.0, "eta": 0.1}},
        {"class_path": "tl_modules.MCC", "init_args": {"weight": 0.5}},
        {"class_path": "SHOT", "init_args": {"momentum": 0.9, "beta": 0.1}},
        {"class_path": "mine.SHOT", "init_args": {"momentum": 0.9}},
    ]
    model = {"class_path": "tl_modules.Classification", "init_args": {"methods": methods}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    read = read_config(tmp_path, ["mine"])["model"]["init_args"]["methods"]
    assert [method["init_args"] for method in read] == [{"eta": 0.1}, {"weight": 0.5}, {"beta": 0.1}, {"momentum": 0.9}]


@pytest.mark.parametrize(("given", "weight", "now"), [(0, 2.0, 2.0), (0, None, 0), (1.0, 2.0, 1.0)])
def test_what_mixup_mixes_counts_as_its_term_did(given, weight, now, tmp_path):
    methods = [{"class_path": "tl_modules.Mixup", "init_args": {"alpha": 0.2} | ({"weight": weight} if weight else {})}]
    model = {"class_path": "tl_modules.Classification", "init_args": {"methods": methods, "source_weight": given}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    read = read_config(tmp_path)["model"]["init_args"]
    assert read == {"methods": [{"class_path": "tl_modules.Mixup", "init_args": {"alpha": 0.2}}], "source_weight": now}


@pytest.mark.parametrize(("then", "now"), [
    ({"num_outputs": 2, "class_names": ["a", "b"]}, {"x": {}, "y": {"classes": ["a", "b"]}}),
    ({"num_outputs": 3, "class_names": None}, 3),
    ({"num_outputs": 3}, 3),
    ({"schema": 2}, 2),
])  # fmt: skip
def test_outputs_and_classes_become_a_schema(then, now, tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "Classification", "init_args": then}})
    )
    assert read_config(tmp_path)["model"]["init_args"] == {"schema": now}
