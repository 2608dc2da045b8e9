"""Run directories of somebody who means harm: none of them runs code, none writes outside itself."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tl_modules import UserError, load_run
from tl_modules.runs.trust import check_config, to_trust

COMMANDS = ("test", "validate", "predict", "embed", "benchmark", "fit --resume")
EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from tl_modules import Method
class Evil(Method):
    def __init__(self, *args, **kwargs):
        super().__init__()
def evil(*args, **kwargs):
    pathlib.Path({mark!r}).touch()
"""
NAME = "shared.version_0.notes.Evil"
AS_TEXT = f'{{"class_path": "{NAME}"}}'


class Received:
    """A copy of the run in `shared/version_0`, with the sender's code beside it, and the state of the world outside."""

    def __init__(self, trained, home):
        import shutil

        self.home, self.run, self.mark = home, home / "here" / "shared" / "version_0", home / "pwned"
        shutil.copytree(trained, self.run)
        self.config = yaml.safe_load((self.run / "config.yaml").read_text())
        self.model, self.trainer, self.data = (self.config[k] for k in ("model", "trainer", "data"))
        for place in (self.run, self.run.parent, self.run.parent.parent):
            (place / "notes.py").write_text(EVIL.format(mark=str(self.mark)))
        self.outside = home / "outside"
        self.outside.mkdir()
        (self.outside / "precious").write_text("precious")

    def write(self):
        (self.run / "config.yaml").write_text(yaml.safe_dump(self.config))

    def intact(self):
        found = {p.relative_to(self.home): p.read_bytes() if p.is_file() else None for p in self.outside.rglob("*")}
        assert found == {Path("outside/precious"): b"precious"}
        assert not self.mark.exists(), "the sender's code has run"
        assert {p.name for p in self.home.iterdir()} == {"here", "outside"}
        assert {p.name for p in (self.home / "here").iterdir()} <= {"shared", "notes.py", "evil.yaml"}


@pytest.fixture
def received(trained, tmp_path):
    return Received(trained, tmp_path)


@pytest.fixture
def try_all(received, tl, monkeypatch):
    """Runs every command on it, and `load_run`; returns the errors. `refused` says whether there must be one."""

    def call(refused=True, commands=COMMANDS, where="here"):
        monkeypatch.chdir(received.home / where)
        run = os.path.relpath(received.run)
        errors = []
        for command in commands:
            monkeypatch.setattr(sys, "path", ["", *sys.path])  # as `python -m` has it
            result = tl(f"{command} --run {run}")
            received.intact()
            assert result.code == (2 if refused else 0), (command, result.err)
            assert "Traceback" not in result.err
            errors += [line for line in result.err.splitlines() if line.startswith("tl: error: ")]
        return errors

    return call


ARGUMENTS = ("methods", "head", "optimizer", "lr_scheduler", "finetuning", "backbone")


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("text", ["once", "twice", "yaml"])
def test_a_class_in_a_text(argument, text, received, try_all):
    value = {"once": AS_TEXT, "twice": yaml.safe_dump(AS_TEXT), "yaml": f"class_path: {NAME}\n"}[text]
    received.model["init_args"][argument] = f"[{value}]" if argument == "methods" and text == "once" else value
    received.write()
    try_all(commands=("test", "fit --resume"))
    with pytest.raises(UserError):
        load_run(received.run)
    received.intact()


@pytest.mark.parametrize("section", ["callbacks", "logger", "plugins", "profiler", "strategy"])
def test_a_class_in_a_text_of_the_trainer(section, received, try_all):
    received.trainer[section] = f"[{AS_TEXT}]" if section in ("callbacks", "plugins") else AS_TEXT
    received.write()
    try_all(commands=("test", "fit --resume"))


@pytest.mark.parametrize("place", ["model", "data", "trainer", "cache"])
def test_a_section_that_is_a_text(place, received, try_all):
    received.config[place] = yaml.safe_dump(received.config[place])
    received.write()
    assert all(f"{place} is not a mapping" in error for error in try_all(commands=("test",)))


@pytest.mark.parametrize("argument", [*ARGUMENTS, "augment"])
@pytest.mark.parametrize("name", [NAME, "notes.evil", "notes.Evil", "os.system", "torch.hub.load", "builtins.exec"])
def test_a_name_of_the_senders(argument, name, received, try_all):
    section = received.data if argument == "augment" else received.model
    section["init_args"][argument] = [{"class_path": name}] if argument in ("methods", "augment") else name
    received.write()
    assert any(f"names {name}" in error for error in try_all(commands=("test",)))
    received.intact()


@pytest.mark.parametrize("name", ["notes.evil", "os.system"])
def test_a_tokenizer_of_the_senders(name, received, try_all):
    arguments = {"name": "vectors.txt", "tokenizer": name}
    received.model["init_args"]["backbone"] = {"class_path": "tl_modules.WordVectors", "init_args": arguments}
    received.write()
    assert any(f"names {name}" in error for error in try_all(commands=("test",)))
    received.intact()


def test_configs_beside_the_run(received, try_all):
    """The parser replaces the path of a file by its contents."""
    evil = {"methods": [{"class_path": NAME}], "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}}
    for key, section in (("methods", received.model["init_args"]), ("logger", received.trainer)):
        for where in (received.run, received.home / "here"):
            (where / "evil.yaml").write_text(yaml.safe_dump(evil[key]))
        before = section.get(key)
        section[key] = "evil.yaml"
        received.write()
        try_all(commands=("test", "fit --resume"))
        section[key] = before


@pytest.mark.parametrize("key", ["init_args.methods", "init_args.methods+", "methods"])
def test_keys_with_points(key, received, try_all):
    received.model[key] = [{"class_path": NAME}]
    received.write()
    try_all(commands=("test",))


def test_aliases(received, try_all):
    spec = {"class_path": NAME}
    received.model["init_args"]["methods"] = [spec, spec]
    received.write()
    assert "&id" in (received.run / "config.yaml").read_text()
    assert any(f"names {NAME}" in error for error in try_all(commands=("test",)))


def test_aliases_without_end(received, try_all):
    whole = received.config
    whole["model"]["init_args"]["methods"] = [whole["model"]]
    received.write()
    assert any("nested too deeply" in error for error in try_all(commands=("test",)))
    laughs = ["ha"]
    for _ in range(40):
        laughs = [laughs] * 10
    whole["model"]["init_args"]["methods"] = laughs
    received.write()
    assert any("nested too deeply" in error for error in try_all(commands=("test",)))


class Reduce:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("file", ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "selection.pt"])
def test_a_pickle_that_runs_code(file, received, try_all):
    content = torch.load(received.run / file, weights_only=True) if (received.run / file).exists() else {}
    torch.save(content | {"extra": Reduce(received.mark)}, received.run / file)
    command = {"checkpoints/last.ckpt": "fit --resume"}.get(file, "test")
    if file == "selection.pt":
        with pytest.raises(pickle.UnpicklingError):
            try_all(commands=(command,))
    else:
        assert any("holds Python objects" in error for error in try_all(commands=(command,)))
    received.intact()


@pytest.mark.parametrize("spec", [
    {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os.system"}},
    {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "notes.evil"}},
    {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": {"class_path": NAME}}},
])  # fmt: skip
def test_a_callable_argument(spec, received, try_all):
    received.model["init_args"]["lr_scheduler"] = spec
    received.write()
    try_all(commands=("test", "fit --resume"))


def test_a_transform_that_calls(received, try_all):
    spec = {"class_path": "torchvision.transforms.v2.Lambda", "init_args": {"lambd": "os.system"}}
    received.data["init_args"]["augment"] = [spec]
    received.write()
    assert all("names os.system" in error for error in try_all(commands=("test", "fit --resume")))


@pytest.mark.parametrize("where", ["here", "here/shared", "here/shared/version_0"])
def test_files_named_as_packages_that_are_imported_late(where, received, try_all):
    """`sys.path` begins with the working directory under `python -m`; late imports would come from there."""
    for name in (
        "sitecustomize",
        "usercustomize",
        "sklearn",
        "matplotlib",
        "scipy",
        "timm",
        "ot",
        "tensorboard",
        "secret",
    ):
        for place in (received.run, received.run.parent, received.home / "here"):
            (place / f"{name}.py").write_text(EVIL.format(mark=str(received.mark)))
    (received.run / "evil.pth").write_text("import notes\n")
    before = dict(sys.modules)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "ot", "matplotlib")]:
        del sys.modules[name]
    try:
        received.intact = lambda: None if not received.mark.exists() else pytest.fail("the sender's code has run")
        try_all(refused=False, commands=("test", "predict"), where=where)
        with pytest.raises(ImportError):
            __import__("secret")
    finally:
        sys.modules.update(before)


@pytest.mark.parametrize("spec", [
    {"class_path": "TorchHubBackbone", "init_args": {"repo": "REPO", "name": "evil"}},
    {"class_path": "HubBackbone", "init_args": {"repo": "REPO", "name": "evil"}},
    {"class_path": "tl_modules.HubBackbone", "init_args": {"repo": "REPO", "name": "evil"}},
    {"class_path": "tl_modules.backbones.vision.HubBackbone", "init_args": {"repo": "REPO", "name": "evil"}},
    {"class_path": "tl_modules.TorchHubBackbone", "init_args": {"repo": "REPO", "name": "evil"}},
    {"class_path": "tl_modules.backbones.vision.TorchHubBackbone", "init_args": {"repo": "REPO", "name": "evil"}},
    '{"class_path": "TorchHubBackbone", "init_args": {"repo": "REPO", "name": "evil"}}',
])  # fmt: skip
def test_torch_hub(spec, received, try_all):
    (received.run / "hubconf.py").write_text(EVIL.format(mark=str(received.mark)))
    spec = yaml.safe_load(yaml.safe_dump(spec).replace("REPO", str(received.run)))
    received.model["init_args"]["backbone"] = spec
    received.write()
    try_all(commands=("test", "fit --resume"))
    with pytest.raises(UserError):
        load_run(received.run)


@pytest.mark.parametrize("loader", ["notes.evil", "os.system", "torch.hub.load", "tl_modules.load_run"])
def test_a_loader_of_the_senders(loader, received, try_all):
    spec = {"class_path": "TorchBackbone", "init_args": {"loader": loader, "arguments": {"command": "true"}}}
    received.model["init_args"]["backbone"] = spec
    received.write()
    try_all(commands=("test",))
    with pytest.raises(UserError):
        load_run(received.run)


def test_a_teacher_is_read_by_the_same_rules(received, try_all):
    """`Hint` reads its teacher when the model is built."""
    import shutil

    teacher = received.run.parent / "teacher"
    shutil.copytree(received.run, teacher)
    evil = yaml.safe_load((teacher / "config.yaml").read_text())
    evil["model"]["init_args"]["methods"] = [{"class_path": NAME}]
    (teacher / "config.yaml").write_text(yaml.safe_dump(evil))
    hint = {"class_path": "tl_modules.Hint", "init_args": {"teacher": str(teacher)}}
    received.model["init_args"]["methods"] = [hint]
    received.write()
    try_all(commands=("test", "fit --resume"))


def loggers(outside):
    return {
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": outside}},
        "bare logger": {"class_path": "CSVLogger", "init_args": {"save_dir": outside}},
        "tensorboard": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": outside}},
    }


@pytest.mark.parametrize("kind", [*loggers(""), "list"])
def test_a_logger_that_writes_elsewhere(kind, received, try_all):
    specs = loggers(str(received.outside))
    received.trainer["logger"] = specs.get(kind, [specs["logger"]])
    received.write()
    assert all("Logger" in error for error in try_all(commands=("test", "fit --resume")))


@pytest.mark.parametrize("spec", [
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "OUT"}},
    {"class_path": "ModelCheckpoint", "init_args": {"filename": "../../../../outside/x"}},
    {"class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint", "init_args": {"dirpath": "OUT"}},
    {"class_path": "tl_modules.runs.RunFiles", "init_args": {"path": "OUT", "config": {"a": 1}}},
    {"class_path": "RunFiles", "init_args": {"path": "OUT", "config": {"a": 1}}},
    {"class_path": "tl_modules.cache.FeatureCache", "init_args": {"folder": "OUT", "disk_gb": 1e-9}},
    {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": "os.system"}},
])  # fmt: skip
def test_a_callback_that_writes_elsewhere(spec, received, try_all):
    received.trainer["callbacks"] = [yaml.safe_load(yaml.safe_dump(spec).replace("OUT", str(received.outside)))]
    received.write()
    try_all(commands=("test", "fit --resume"))


def test_other_classes_that_write_or_fetch(received, try_all):
    spec = {
        "class_path": "lightning.pytorch.profilers.PyTorchProfiler",
        "init_args": {"dirpath": str(received.outside)},
    }
    received.trainer["profiler"] = spec
    received.write()
    assert all("can write files or run code" in error for error in try_all(commands=("test",)))
    received.trainer["profiler"] = None
    received.config["data"] = {"class_path": "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule"}
    received.write()
    assert all("can write files or run code" in error for error in try_all(commands=("test",)))


def test_the_cache_is_the_machines(received, try_all):
    (received.outside / ("0" * 32)).mkdir()
    (received.outside / ("0" * 32) / "meta.json").write_text("{}")
    entry = received.outside / ("0" * 32) / "meta.json"
    received.config["cache"] = {"enabled": True, "folder": str(received.outside), "disk_gb": 1e-9}
    received.model["init_args"]["finetuning"] = "tl_modules.FeatureExtraction"
    received.write()
    received.intact = lambda: None if entry.exists() else pytest.fail("an entry was removed")
    try_all(refused=False, commands=("test",))


@pytest.mark.parametrize("link", [
    "checkpoints", "embeddings", "00000", "metrics.json", ".metrics.json.part", "predictions.csv", "selection.csv",
    "benchmark.json", ".benchmark.json.part", "checkpoints/.last.ckpt.part", "default/projector",
])  # fmt: skip
def test_links_out_of_the_run(link, received, try_all):
    path = received.run / link
    target = received.outside / "precious"
    if "." not in link:
        target = received.outside
        if path.exists():
            path.rename(received.run / "moved")
    elif path.exists():
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))
    assert all("outside the run" in error for error in try_all())


def test_a_link_within_the_run_is_fine(received, try_all):
    (received.run / "newest.ckpt").symlink_to("checkpoints/best.ckpt")
    try_all(refused=False, commands=("test",))


# What is one's own


OWN = {
    "callback": ({"trainer": {"callbacks": [{"class_path": "mine.Mine"}]}}, ["mine"]),
    "logger": ({"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}}},
               ["lightning.pytorch.loggers.CSVLogger"]),
    "checkpoint": ({"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                                               "init_args": {"filename": "{epoch}"}}]}},
                   ["lightning.pytorch.callbacks.ModelCheckpoint"]),
    "average": ({"trainer": {"callbacks": [{"class_path": "EMAWeightAveraging"}]}}, []),
    "names": ({"model": {"init_args": {"class_names": ["[a]", "os.system", "b: c"]}}}, []),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_what_a_run_asks_for_is_what_it_is_told_to_pass(kind):
    config, names = OWN[kind]
    assert to_trust(config) == names
    check_config(config, names, "run: x")
    if names:
        with pytest.raises(UserError, match=f"pass --trust {names[0]}"):
            check_config(config, [], "run: x")


def test_what_the_command_line_names_is_the_users_own(received, tl, monkeypatch):
    monkeypatch.chdir(received.home / "here")
    (received.home / "here" / "own_callback.py").write_text(
        "from lightning.pytorch import Callback\nclass Mine(Callback):\n    pass\n"
    )
    assert tl("test --run shared/version_0 --trainer.callbacks+=own_callback.Mine").code == 0
    assert tl("test --run shared/version_0 --trust not-a-name").code == 2
