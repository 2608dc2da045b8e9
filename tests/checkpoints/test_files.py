"""Files that are whole or not there, and loaders that run nobody's code."""

import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from tl_modules import Classification, ConvNet, UserError, load_run
from tl_modules.backbones.weights import read_weights
from tl_modules.checkpoints.files import (
    AtomicCheckpointIO,
    find_corruption,
    latest_checkpoint,
    load_checkpoint,
    remove_partial_files,
)
from tl_modules.runs.trust import check_config

SMALL = "--trainer.max_epochs 2 --model.backbone.width 4 --data.shots_per_class 4"
CONTENT = {"state_dict": {"w": torch.arange(50_000.0)}, "epoch": 3, "pytorch-lightning_version": "2.6"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_saved_and_loaded(file):
    assert find_corruption(file) is None
    assert torch.equal(load_checkpoint(file)["state_dict"]["w"], CONTENT["state_dict"]["w"])
    assert [p.name for p in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("break_", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b""),
    lambda path: flip(path, path.stat().st_size // 2),
    lambda path: flip(path, path.stat().st_size // 3),
])  # fmt: skip
def test_damage_is_seen(file, break_):
    break_(file)
    assert "is damaged" in find_corruption(file)
    with pytest.raises(UserError, match=r"last.ckpt is damaged"):
        load_checkpoint(file)
    with pytest.raises(UserError, match=r"weights: .*last.ckpt (is damaged|cannot be read)"):
        read_weights(file)


def test_every_flipped_bit_of_the_tensors_is_seen(file):
    start = zipfile.ZipFile(file).infolist()
    data = max(start, key=lambda info: info.file_size)
    for at in range(data.header_offset + 200, data.header_offset + data.file_size, 20_011):
        flip(file, at)
        assert find_corruption(file), at
        flip(file, at)
    assert find_corruption(file) is None


def test_a_failed_save_keeps_the_old_file_and_says_what_it_needs(file, tmp_path):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # its files may not grow beyond 100 kB, which fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            AtomicCheckpointIO().save_checkpoint(CONTENT, file)
        except UserError as error:
            os.write(write_end, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read_end, 10_000).decode()
    assert f"checkpoint: {file} could not be written (File too large); it needs 200,000 bytes" in said
    assert find_corruption(file) is None
    assert [p.name for p in file.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="could not be written"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "runs" / "last.ckpt")


def test_newest_falls_back_and_says_so(file, caplog):
    shutil.copy(file, file.with_name("best.ckpt"))
    shutil.copy(file, file.with_name("older.ckpt"))
    os.utime(file.with_name("older.ckpt"), (1, 1))
    assert latest_checkpoint(file.parent) == file
    assert not caplog.text
    flip(file, file.stat().st_size // 2)
    assert latest_checkpoint(file.parent).name == "best.ckpt"
    assert "last.ckpt is damaged" in caplog.text
    assert "continuing from" in caplog.text
    for path in file.parent.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="there is no other"):
        latest_checkpoint(file.parent)
    assert latest_checkpoint(file.parent / "empty") is None


def test_half_written_files_are_swept(file):
    (file.parent / ".last.ckpt.part").write_bytes(b"x")
    remove_partial_files(file.parent)
    assert [p.name for p in file.parent.iterdir()] == ["last.ckpt"]


def test_a_damaged_last_is_resumed_from_the_best(ok, tmp_path, caplog):
    ok(f"fit {SMALL} --name a")
    folder = tmp_path / "runs" / "a" / "version_0" / "checkpoints"
    (folder / ".best.ckpt.part").write_bytes(b"x")
    flip(folder / "last.ckpt", 5000)
    ok("fit --run runs/a --resume --trainer.max_epochs 3")
    assert "continuing from" in caplog.text
    assert load_checkpoint(folder / "last.ckpt")["epoch"] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt"]


# What trains only


LEAN = f"{SMALL} --model.finetuning LastStages --model.checkpoint_weights trainable --model.backbone.weights runs/source/version_0"


@pytest.fixture
def lean(ok, tmp_path):
    ok("fit --name source --data.source true --data.target false --trainer.max_epochs 1 --model.backbone.width 4")
    ok(f"fit {LEAN} --name lean")
    return tmp_path / "runs" / "lean" / "version_0"


def test_only_what_trains_is_saved_and_loads_everywhere(lean, ok, tl, tmp_path):
    state = load_checkpoint(lean / "checkpoints" / "best.ckpt")["state_dict"]
    assert not any(name.startswith("backbone.model.0") and name.endswith("weight") for name in state)
    assert {"backbone.model.2.0.weight", "head.1.weight", "backbone.model.0.1.running_mean"} <= set(state)
    ok(f"test --run {lean}")
    ok(f"fit --run {lean} --resume --trainer.max_epochs 3")
    source = load_checkpoint(tmp_path / "runs" / "source" / "version_0" / "checkpoints" / "best.ckpt")["state_dict"]
    assert torch.equal(load_run(lean).backbone.model[0][0].weight, source["backbone.model.0.0.weight"])
    said = tl(f"fit {SMALL} --model.backbone.weights {lean}").err
    assert "was saved with checkpoint_weights: trainable" in said


def test_another_backbone_is_refused(lean, ok, tl):
    ok(
        "fit --name other --data.source true --data.target false --trainer.max_epochs 1 --model.backbone.width 4 --seed_everything 5"
    )
    result = tl(f"test --run {lean} --model.backbone.weights runs/other/version_0")
    assert result.code == 2
    assert "on a backbone with other weights than this one" in result.err


def test_an_optimizer_with_other_groups_is_refused(ok, tl):
    ok(f"fit {SMALL} --name a")
    for more in ("--model.head MLPHead", "--model.head CosineHead", "--model.backbone.width 8", "--model.methods+=LwF "
                 "--model.methods.source_classes 3"):  # fmt: skip
        result = tl(f"fit --run runs/a --resume --trainer.max_epochs 3 {more}")
        assert result.code == 2
        assert "use the backbone, head and methods that it was trained with" in result.err


# What would run code


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "runs" / "a" / "version_0"))


@pytest.mark.parametrize("command", ["test --run {run}", "predict --run {run} --out p.csv", "fit --run {run} --resume",
                                     "fit --model.backbone.weights {run}", "test --ckpt_path {run}/checkpoints/best.ckpt",
                                     "fit --ckpt_path {run}/checkpoints/best.ckpt"])  # fmt: skip
def test_a_malicious_pickle_is_not_run(run, tl, tmp_path, command):
    content = load_checkpoint(run / "checkpoints" / "best.ckpt")
    content["state_dict"]["x"] = Payload(tmp_path / "pwned")
    for name in ("best", "last"):
        torch.save(content, run / "checkpoints" / f"{name}.ckpt")
    result = tl(command.format(run=run))
    assert result.code == 2
    assert "could run code" in result.err
    with pytest.raises(UserError, match="could run code"):
        load_run(run)
    with pytest.raises(UserError, match="could run code"):
        read_weights(run)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(UserError):
        read_weights(plain)
    assert not (tmp_path / "pwned").exists()


def test_a_malicious_instantiator_is_not_run(run, tmp_path, ok):
    path = run / "checkpoints" / "best.ckpt"
    content = load_checkpoint(path)
    content["hyper_parameters"] = {
        "_instantiator": "os.system",
        "_class_path": "os.system",
        "command": f"touch {tmp_path}/pwned",
    }
    AtomicCheckpointIO().save_checkpoint(content, path)
    ok(f"test --run {run}")
    load_run(run)
    with pytest.raises(Exception):  # noqa: B017, PT011 - Lightning refuses it in its own words
        Classification.load_from_checkpoint(path, backbone=ConvNet(4), schema=10)
    assert not (tmp_path / "pwned").exists()


MINE = "import pathlib\npathlib.Path('pwned').touch()\nimport tl_modules\nclass Mine(tl_modules.Method):\n    pass\n"


@pytest.mark.parametrize(("place", "name"), [
    ("methods", "mine.Mine"), ("methods", "os.system"), ("head", "os.system"), ("optimizer", "subprocess.Popen"),
    ("optimizer", "torch.hub.load"), ("head", "torch.os.system"), ("backbone", "tl_modules.TorchHubBackbone"),
    ("backbone", "tl_modules.HubBackbone"), ("backbone", "HubBackbone"),
    ("backbone", "tl_modules.backbones.vision.TorchHubBackbone"), ("optimizer", "pickle.Unpickler"),
])  # fmt: skip
@pytest.mark.parametrize("as_text", [True, False])
def test_a_runs_config_names_only_what_runs_are_made_of(run, tl, tmp_path, place, name, as_text):
    (tmp_path / "mine.py").write_text(MINE)
    config = yaml.safe_load((run / "config.yaml").read_text())
    value = name if as_text else {"class_path": name, "init_args": {}}
    config["model"]["init_args"][place] = [value] if place == "methods" else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for command in ("test", "validate", "predict", "fit --resume"):
        result = tl(f"{command} --run {run}")
        assert result.code == 2, result.err
        assert f"config.yaml names {name}" in result.err or "which runs code of a repository" in result.err
    with pytest.raises(UserError, match=r"config.yaml names"):
        load_run(run)
    assert not (tmp_path / "pwned").exists()


def test_the_callback_and_the_transform_of_a_run_are_checked_too(run, tl):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["augment"] = [
        {"class_path": "torchvision.transforms.v2.Lambda", "init_args": {"lambd": "os.system"}}
    ]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "names os.system" in tl(f"test --run {run}").err


def test_what_the_user_vouches_for_is_taken():
    config = {"methods": [{"class_path": "mine.Mine"}], "optimizer": {"class_path": "torch.optim.AdamW"}}
    with pytest.raises(UserError, match="pass --trust mine"):
        check_config(config, [], "run: x")
    check_config(config, ["mine"], "run: x")
    check_config(config, ["mine.Mine"], "run: x")
    with pytest.raises(UserError):
        check_config(config, ["min"], "run: x")


def test_plain_text_is_no_name():
    check_config(
        {"name": "v1.2", "data": {"target": "folder.v2", "classes": ["a.b", "cat"]}, "p": "bf16-mixed"}, [], "run: x"
    )


def test_os_system_is_refused_from_the_command_line_too(tl):
    result = tl(f"fit {SMALL} --model.head os.system")
    assert result.code == 2
    assert "os.system" in result.err
