"""Weights by name: matches are logged, and what does not fit is rejected."""

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tl_modules import Classification, ConvNet, Regression, TorchvisionBackbone, UserError
from tl_modules.backbones.weights import Pretrained, load_weights, read_weights


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.backbone.model.", "_orig_mod.model."])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes_and_wrappers(prefix, wrap, suffix, tmp_path):
    there = ConvNet(4)
    state = {prefix + k: v for k, v in there.model.state_dict().items()}
    file = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        if wrap:
            pytest.skip("a safetensors file is flat")
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        torch.save({wrap: state} if wrap else state, file)
    assert same(ConvNet(4, weights=file), there)


def test_report():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    given = {
        "module.0.weight": torch.ones(3, 2),
        "0.bias": torch.ones(4),
        "extra": torch.ones(1),
        "1.bias": torch.ones(4),
    }
    match = load_weights(model, Pretrained("file", given), strict=False)
    assert match.matched == ["0.weight", "1.bias"]
    assert match.missing == ["1.weight"]
    assert match.unexpected == ["extra"]
    assert match.misshaped == ["0.bias"]
    assert str(match) == "2 matched, 1 missing (1.weight), 1 unexpected (extra), 1 misshaped (0.bias)"
    assert torch.equal(model[0].weight, torch.ones(3, 2))


def test_not_strict_starts_the_rest_at_random(tmp_path):
    there = ConvNet(4)
    torch.save({k: v for k, v in there.model.state_dict().items() if not k.startswith("2")}, tmp_path / "w.pth")
    here = ConvNet(4, weights=tmp_path / "w.pth", strict=False)
    assert torch.equal(here.model[0][0].weight, there.model[0][0].weight)
    assert not torch.equal(here.model[2][0].weight, there.model[2][0].weight)
    with pytest.raises(UserError, match="strict"):
        ConvNet(4, weights=tmp_path / "w.pth")


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, dump in (("a.pth", torch.save), ("b.pth", lambda x, f: pickle.dump(x, f.open("wb")))):
        dump({"state_dict": Evil()}, tmp_path / name)
        with pytest.raises(UserError):
            read_weights(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_a_source_run_brings_its_backbone_and_where_labels_are_shared_its_head(ok, tmp_path):
    ok("fit --name src --data.source true --data.target false --trainer.max_epochs 1 --model.backbone.width 4")
    run = tmp_path / "runs" / "src" / "version_0"
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    names = [str(i) for i in range(10)]
    shared = Classification(ConvNet(4, weights=run), {"y": {"classes": names}})
    assert shared.head_transferred
    assert torch.equal(shared.head[1].weight, state["head.1.weight"])
    assert torch.equal(shared.backbone.model[0][0].weight, state["backbone.model.0.0.weight"])
    other = Classification(
        ConvNet(4, weights=run / "checkpoints" / "best.ckpt"), {"y": {"classes": list("abcdefghij")}}
    )
    assert not other.head_transferred
    assert not torch.equal(other.head[1].weight, state["head.1.weight"])
    assert not Regression(ConvNet(4, weights=run), 10).head_transferred


def test_weights_on_the_command_line_may_be_a_run(ok, tmp_path):
    ok("fit --name src --data.source true --data.target false --trainer.max_epochs 1 --model.backbone.width 4")
    ok(
        "fit --name dst --trainer.max_epochs 1 --model.backbone.width 4 --model.finetuning FeatureExtraction "
        "--model.backbone.weights runs/src"
    )
    states = [
        torch.load(tmp_path / f"runs/{name}/version_0/checkpoints/{ckpt}.ckpt", weights_only=True)["state_dict"]
        for name, ckpt in (("src", "best"), ("dst", "last"))
    ]
    backbone = [{k: v for k, v in state.items() if k.startswith("backbone")} for state in states]
    assert all(torch.equal(backbone[0][k], backbone[1][k]) for k in backbone[0])


def test_a_run_from_before_keeps_its_head(ok, tmp_path):
    """`MLPHead` did not normalise in version 0.1, whose configs do not say so."""
    ok("fit --name x --trainer.max_epochs 1 --model.backbone.width 4 --model.head MLPHead --model.head.normalize false "
       "--model.head.hidden 8 --data.shots_per_class 4")  # fmt: skip
    file = tmp_path / "runs" / "x" / "version_0" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "normalize: false" not in line))
    assert len(file.read_text().splitlines()) == len(lines) - 1
    ok("test --run runs/x/version_0")


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def foreign(net, other):
    """Files written by other tools: their contents, and the prefix that is logged."""
    yield (
        "moco",
        {"epoch": 1, "state_dict": prefixed("module.encoder_q.", net) | prefixed("module.encoder_k.", other)},
        "encoder_q.",
    )
    yield (
        "dino",
        {"student": prefixed("module.backbone.", other), "teacher": prefixed("backbone.", net)},
        "teacher.backbone.",
    )
    yield (
        "fastai",
        {"model": prefixed("0.", net) | {"1.8.weight": torch.ones(3)}, "opt": {"state": [{"mom": net}]}},
        "0.",
    )
    yield "net", {"net": net, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, "net."
    yield "params", {"params": net}, "params."
    yield "encoder", prefixed("encoder.", net) | {"decoder.weight": torch.ones(3)}, "encoder."
    yield "hugging face", prefixed("resnet.", net) | {"classifier.1.weight": torch.ones(3)}, "resnet."
    yield "timm", {"state_dict": net, "args": argparse.Namespace(lr=0.1, model="x"), "arch": "x"}, None
    yield "accelerate", {"ema": {"module": net}, "step": torch.tensor(3)}, "ema.module."
    yield (
        "lightly",
        {"state_dict": prefixed("backbone.", net) | prefixed("backbone_momentum.", other)},
        "state_dict.backbone.",
    )


@pytest.mark.parametrize("number", range(10))
def test_checkpoints_of_others(number, tmp_path, caplog):
    caplog.set_level("INFO", "tl_modules")
    there, other = ConvNet(4), ConvNet(4)
    _, content, prefix = list(foreign(there.model.state_dict(), other.model.state_dict()))[number]
    torch.save(content, tmp_path / "w.pth")
    assert same(ConvNet(4, weights=tmp_path / "w.pth"), there)
    assert (f"the tensors with prefix {prefix}" in caplog.text) == (prefix is not None)


def test_a_body_of_fastai_has_numbers_for_names(tmp_path):
    there = TorchvisionBackbone("resnet18")
    body = torch.nn.Sequential(*list(there.model.children())[:-2])
    torch.save({"model": prefixed("0.", body.state_dict()) | {"1.8.weight": torch.ones(3, 512)}}, tmp_path / "w.pth")
    assert same(TorchvisionBackbone("resnet18", weights=tmp_path / "w.pth"), there)


@pytest.mark.parametrize(
    ("name", "form"),
    [("resnet18", {"layer_type": "basic", "depths": [2] * 4, "hidden_sizes": [64, 128, 256, 512]}), ("resnet50", {})],
)
def test_a_resnet_of_hugging_face(name, form, tmp_path):
    transformers = pytest.importorskip("transformers")
    there = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=7, **form)).double().eval()
    for module in there.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    there.save_pretrained(tmp_path)
    here = TorchvisionBackbone(name, weights=tmp_path / "model.safetensors").double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        ours, theirs = here.model(x).flatten(1), there.resnet(x).pooler_output.flatten(1)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())
    assert torch.equal(here.pretrained.head["weight"].double(), there.classifier[1].weight)
    with pytest.raises(UserError, match=r"none of its .* tensors \(resnet\.embedder\..* has a name"):
        ConvNet(4, weights=tmp_path / "model.safetensors")


def test_several_prefixes_are_asked_for(tmp_path):
    one, two = TorchvisionBackbone("squeezenet1_1"), TorchvisionBackbone("squeezenet1_1")
    torch.save({"params": one.model.state_dict(), "params_ema": two.model.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"several times, with the prefixes params\., params_ema\.; pass one .*weights_prefix"
    ):
        TorchvisionBackbone("squeezenet1_1", weights=tmp_path / "w.pth")
    for prefix in ("params_ema", "params_ema."):
        assert same(TorchvisionBackbone("squeezenet1_1", weights=tmp_path / "w.pth", weights_prefix=prefix), two)
    with pytest.raises(
        UserError, match=r"weights_prefix: no name in .* begins with ema\.; its names are params\.features"
    ):
        TorchvisionBackbone("squeezenet1_1", weights=tmp_path / "w.pth", weights_prefix="ema")


@pytest.mark.parametrize(
    ("one", "two"), [("ema", "state_dict"), ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("a", "teacher")]
)
def test_a_mean_beside_the_weights_is_asked_for(one, two, tmp_path):
    states = {name: ConvNet(4) for name in (one, two)}
    torch.save({name: net.model.state_dict() for name, net in states.items()} | {"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=rf"several times, with the prefixes {one}\., {two}\.; pass one .*weights_prefix"
    ):
        ConvNet(4, weights=tmp_path / "w.pth")
    for name, net in states.items():
        model = ConvNet(4).model
        load_weights(model, read_weights(tmp_path / "w.pth"), prefix=name)
        assert same(model, net.model)


def test_a_copy_that_is_not_taken_is_told(tmp_path, caplog):
    caplog.set_level("INFO", "tl_modules")
    q, k = (prefixed(f"encoder_{name}.", ConvNet(4).model.state_dict()) for name in "qk")
    torch.save(q | k, tmp_path / "w.pth")
    ConvNet(4, weights=tmp_path / "w.pth")
    told = "the tensors with prefix encoder_q.; --model.backbone.weights_prefix takes others that fit: encoder_k."
    assert told in caplog.text


def test_a_deeper_network_of_the_same_widths_is_refused(tmp_path):
    torch.save(TorchvisionBackbone("resnet34").model.state_dict(), tmp_path / "w.pth")
    further = (
        r"does not fit TorchvisionBackbone resnet18: it has 96 tensors of further blocks \(layer1.2.conv1.weight, "
    )
    with pytest.raises(UserError, match=further + r".*\.\.\.\); name the matching architecture, or pass strict: false"):
        TorchvisionBackbone("resnet18", weights=tmp_path / "w.pth")
    TorchvisionBackbone("resnet18", weights=tmp_path / "w.pth", strict=False)


def test_further_blocks_are_found_in_rows_of_any_name():
    rows = {f"dense.layer{number}": torch.nn.Linear(2, 2) for number in (1, 2, 3)}
    states = [prefixed(f"{name}.", layer.state_dict()) for name, layer in rows.items()]
    model = torch.nn.ModuleDict({"dense": torch.nn.ModuleDict({"layer1": rows["dense.layer1"]})})
    given = Pretrained("file", {**states[0], **states[2], "head.layer1.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"2 tensors of further blocks \(dense.layer3.weight, dense.layer3.bias\)"):
        load_weights(model, given)
    assert load_weights(model, given, classifier="dense.layer3").matched == ["dense.layer1.weight", "dense.layer1.bias"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_heads_are_no_further_blocks(name, tmp_path):
    there = TorchvisionBackbone(name)
    heads = ("classifier.8.weight", "classifier.6.0.weight", "fc.0.weight", "projector.2.bias", "aux1.0.weight")
    beside = (*heads, "layer1.0.total_ops", "head.1.weight")
    torch.save(there.model.state_dict() | dict.fromkeys(beside, torch.ones(3)), tmp_path / "w.pth")
    assert same(TorchvisionBackbone(name, weights=tmp_path / "w.pth"), there)


def test_a_prefix_that_is_not_the_one_found(tmp_path):
    one, two = TorchvisionBackbone("squeezenet1_1"), TorchvisionBackbone("squeezenet1_1")
    q, k = (prefixed(f"module.encoder_{name}.", each.model.state_dict()) for name, each in (("q", one), ("k", two)))
    torch.save({"state_dict": q | k}, tmp_path / "w.pth")
    for prefix in ("encoder_k", "state_dict.module.encoder_k."):
        assert same(TorchvisionBackbone("squeezenet1_1", weights=tmp_path / "w.pth", weights_prefix=prefix), two)


def test_errors_show_what_is_found_and_wanted(tmp_path):
    torch.save({"resnet.embedder.weight": torch.ones(2), "resnet.pooler.bias": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"2 tensors \(resnet.embedder.weight, resnet.pooler.bias\) has .* \(0.0.weight, "
    ):
        ConvNet(4, weights=tmp_path / "w.pth")
    state = ConvNet(4).model.state_dict()
    torch.save({k: v for k, v in state.items() if k != "0.0.weight"} | {"stem": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"are not in it \(0.0.weight; it has stem\)"):
        ConvNet(4, weights=tmp_path / "w.pth")


def as_arrays(state, file):
    torch.save({"model": {key: value.numpy() for key, value in state.items()}, "classes": np.array(["a"])}, file)


def as_big_endian(state, file):
    arrays = {key: value.numpy() for key, value in state.items()}
    torch.save({key: each.astype(each.dtype.newbyteorder(">"), order="F") for key, each in arrays.items()}, file)


def as_safetensors(state, file):
    save_file({key: value.contiguous() for key, value in state.items()}, file)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("safetensors.pth", as_safetensors),
        ("pickle.safetensors", torch.save),
        ("arrays.pth", as_arrays),
        ("big.pth", as_big_endian),
        (
            "defaultdict.pth",
            lambda state, file: torch.save(defaultdict(dict, {"model": defaultdict(list, state)}), file),
        ),
        ("ordered.pth", lambda state, file: torch.save(OrderedDict(state), file)),
        ("folder/model.safetensors", as_safetensors),
        ("folder/pytorch_model.bin", torch.save),
    ],
)
def test_files_are_read_by_their_content(name, write, tmp_path):
    there = ConvNet(4)
    (tmp_path / "folder").mkdir()
    write(there.model.state_dict(), tmp_path / name)
    assert same(ConvNet(4, weights=tmp_path / name.partition("/")[0]), there)


def test_archives_are_refused_by_what_they_are(tmp_path):
    net = torch.nn.Linear(2, 2)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", weight=np.ones(2))
    torch.jit.script(net).save(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.write(tmp_path / "w.pth", "w.pth")
    for name, reason in (
        ("w.npz", "is an archive of numpy; save dict(numpy.load(FILE)) by torch.save"),
        ("w.pt", "is TorchScript, which holds code; save torch.jit.load(FILE).state_dict() by torch.save"),
        ("w.zip", "is an archive of w.pth; unpack it, and pass the file of the weights"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{name} {reason}")):
            read_weights(tmp_path / name)
    torch.save(torch.ones(3), tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_numpy_beside_the_weights(core, tmp_path):
    there = ConvNet(4)
    beside = {"loss": np.float64(0.5), "step": np.int64(3), "curve": np.arange(3.0), "name": np.str_("a")}
    content = {"model": there.model.state_dict(), **beside}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    written = (tmp_path / "w.pth").read_bytes()
    assert b"multiarray\nscalar" in written
    mine = b"_core" if b"numpy._core" in written else b"core"
    (tmp_path / "w.pth").write_bytes(written.replace(b"numpy.%s.multi" % mine, b"numpy.%s.multi" % core.encode()))
    assert same(ConvNet(4, weights=tmp_path / "w.pth"), there)


@pytest.mark.parametrize("hide", [lambda x: argparse.Namespace(x=x), lambda x: np.array([x]), lambda x: {"x": x}])
def test_nothing_hides_code(hide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "args": hide(Evil())}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="could run code"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only points to a file that Git LFS keeps"),
        (b"<!DOCTYPE html><html>404</html>", "cannot be read as tensors"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_downloads_leave_in_place_of_weights(content, reason, suffix, tmp_path):
    (tmp_path / f"w.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=f"w.{suffix} {reason}"):
        read_weights(tmp_path / f"w.{suffix}")


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = ConvNet(4).model.state_dict()
    state["0.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds numbers that are not finite, in 0.0.weight"):
        ConvNet(4, weights=tmp_path / "w.pth")
