"""Runs of earlier versions are read as they were meant."""

import yaml

from tl_modules.runs.directory import read_config


def test_what_a_method_no_longer_takes_is_left_out(tmp_path):
    methods = [
        {"class_path": "tl_modules.GroupDRO", "init_args": {"weight": 1.0, "eta": 0.1}},
        {"class_path": "tl_modules.MCC", "init_args": {"weight": 0.5}},
    ]
    model = {"class_path": "tl_modules.Classification", "init_args": {"methods": methods}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    read = read_config(tmp_path)["model"]["init_args"]["methods"]
    assert [method["init_args"] for method in read] == [{"eta": 0.1}, {"weight": 0.5}]
