"""When a test here fails, what it names has changed: `tl_modules/batch/compat.py` can lose a workaround, or must follow."""

import argparse
import ast
import inspect
from pathlib import Path

import pytest
import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from torch import nn

from tl_modules.batch import compat

ROOT = Path(__file__).parents[2]


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_torch_has_no_public_base_of_batchnorm_and_convolutions():
    assert {nn.Conv1d, nn.Conv2d, nn.Conv3d} <= set(compat.Convolution.__subclasses__())
    assert not {base for base in nn.Conv2d.__mro__[1:-2] if not base.__name__.startswith("_")}
    assert {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm} <= set(compat.BatchNorm.__subclasses__())
    assert not {base for base in nn.BatchNorm2d.__mro__[1:-2] if not base.__name__.startswith("_")}


def test_torch_has_no_public_trees_and_dispatch_modes():
    assert not {"pytree", "python_dispatch"} & public(torch.utils)


def test_a_scheduler_cannot_be_told_its_present_rates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert set(compat.SCHEDULER_STATE) <= set(scheduler.state_dict())
    assert not {name for name in public(scheduler) if name.startswith("set_")}
    compat.set_rates(scheduler, [0.5])
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [0.5]


def test_an_empty_storage_has_no_address():
    a, b = torch.empty(0), torch.empty(0)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert compat.storage_key(a) == compat.storage_key(a.view(0, 1)) != compat.storage_key(b)


def test_capabilities_of_the_processor_are_public_above_our_lowest_torch():
    assert '"torch>=2.6"' in (ROOT / "pyproject.toml").read_text()
    if hasattr(torch.cpu, "get_capabilities"):
        assert compat.cpu_has_bf16() == torch.cpu.get_capabilities().get("avx512_bf16", False)


def test_a_module_without_a_trainer_raises():
    module = LightningModule()
    assert not compat.attached(module)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer
    module.trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert compat.attached(module)


def test_a_strategy_does_not_say_how_it_was_made():
    made = DDPStrategy(find_unused_parameters=True)
    assert compat.finds_unused_parameters(made)
    assert not compat.finds_unused_parameters(DDPStrategy())
    assert not compat.synchronizes_batchnorm(made)
    made._layer_sync = TorchSyncBatchNorm()
    assert compat.synchronizes_batchnorm(made)
    assert not {name for name in public(made) if "unused" in name or "layer" in name}


def test_an_averaging_callback_does_not_show_its_average():
    callback = EMAWeightAveraging()
    assert compat.average_of(callback) is None
    assert not {name for name in public(callback) if "model" in name}


def test_the_import_policy_cannot_be_read():
    import jsonargparse
    from jsonargparse._common import parsing_settings

    before = parsing_settings["import_path_verdicts"]
    with compat.import_policy_kept():
        set_parsing_settings(import_path_denylist=["*"])
        assert parsing_settings["import_path_verdicts"] != before
    assert parsing_settings["import_path_verdicts"] == before
    assert not {name for name in public(jsonargparse) if "get_parsing_setting" in name}


def test_jsonargparse_knows_a_class_by_one_name():
    from jsonargparse import _typehints

    resolve = _typehints.resolve_class_path_by_name
    try:
        assert resolve(nn.Module, "Earlier") == "Earlier"
        used = []
        names = {"Earlier": "Bilinear", "CELU": "Bilinear", "Other": "None"}
        compat.name_classes_too(lambda name: names.get(name, name), lambda *both: used.append(both))
        resolve_too = _typehints.resolve_class_path_by_name
        assert resolve_too(nn.Module, "Earlier") == resolve_too((int, nn.Module), "Earlier") == "torch.nn.Bilinear"
        assert resolve_too(nn.Module, "CELU") == "torch.nn.CELU"
        assert resolve_too(nn.Module, "Other") == "Other"
        assert set(used) == {("Earlier", "Bilinear")}
    finally:
        _typehints.resolve_class_path_by_name = resolve


def test_argparse_does_not_list_its_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--here")
    assert "--here" in compat.options(parser)
    assert not {name for name in public(parser) if "option" in name}


def test_the_command_line_has_no_public_hooks_around_a_command():
    for name in ("_add_subcommands", "_run_subcommand", "_prepare_subcommand_parser", "_parser", "_parse_ckpt_path"):
        assert name in vars(LightningCLI)
    assert {name for name in public(LightningCLI) if "subcommand" in name} == {"subcommands"}


def test_lightning_asks_all_callbacks_and_notes_the_hook_by_setattr():
    source = inspect.getsource(call._call_callback_hooks)
    assert "for callback in callbacks:" in source
    assert "is_overridden" not in source
    assert "._current_fx_name = hook_name" in source
    assert "_run_stage" in vars(Trainer)
    assert all(hasattr(Callback, hook) for hook in compat.STEP_HOOKS)


def test_torch_tells_in_private_alone_what_a_replay_asks():
    module = nn.Linear(2, 2)
    assert not compat.is_compiled(module)
    assert not {name for name in public(module) if "compile" in name} - {"compile"}
    assert torch.equal(compat.call_uncompiled(module, torch.ones(1, 2)), module(torch.ones(1, 2)))
    tensor = torch.zeros(1)
    before = compat.times_written(tensor)
    tensor.add_(1)
    assert compat.times_written(tensor) == before + 1
    assert not {name for name in public(tensor) if "version" in name}
    assert not hasattr(torch.utils, "pytree") or not hasattr(torch.utils.pytree, "register_pytree_node")


def test_adam_looks_for_a_gpu_in_each_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    asked = []
    optimizer._accelerator_graph_capture_health_check = lambda: asked.append(True)
    optimizer.step()
    assert asked
    compat.skip_graph_check(optimizer)
    optimizer.step()
    assert len(asked) == 1


def names(tree):
    """Private names that a file imports or reads of something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from [*str(node.module).split("."), *(alias.name for alias in node.names)]


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_private_names_of_others_are_in_one_file():
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "tl_modules").rglob("*.py")}
    ours = {"_fields", "_replace", "_asdict"}  # of a NamedTuple, public
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.id if isinstance(node, ast.Name) else node.attr)
    ours -= {name for kind in (LightningModule, LightningCLI, Trainer, nn.Module) for name in dir(kind)}
    for path, tree in trees.items():
        if path.name != "compat.py":
            assert not {name for name in names(tree) if private(name)} - ours, path
            overrides = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and private(n.name)}
            assert not overrides - ours, path
