"""What adapts in a test: the statistics, steps and prototypes by hand, and that nothing of it stays."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from datamodules import TransferDataModule
from tl_modules import (
    DSBN,
    T3A,
    TENT,
    AdaBN,
    Backbone,
    Classification,
    CosineHead,
    MLPHead,
    Regression,
    StochNorm,
    UserError,
)

N, C = 192, 3
ADAPTATIONS = {"AdaBN": AdaBN, "TENT": lambda: TENT(lr=0.05), "T3A": lambda: T3A(filter_k=4)}


class Vectors(Backbone):
    out_features = 8

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), norm(16), nn.ReLU(inplace=True), nn.Linear(16, 8), norm(8))

    def forward(self, x):
        return self.layers(x)

    def stages(self):
        return [self.layers]


class Data(TransferDataModule):
    """Vectors of another distribution than the model's, sorted by class."""

    num_outputs = C

    def __init__(self, labels=None, samples=N, **kwargs):
        super().__init__(**kwargs)
        y = torch.arange(samples) * C // samples
        self.x = 2 * torch.eye(C, 5)[y] + 3 + 2 * torch.randn(samples, 5, generator=torch.Generator().manual_seed(0))
        self.y = y if labels is None else labels

    def domains(self, split):
        return {"target": TensorDataset(self.x, self.y)}


class Probe(Callback):
    """What happens in the pass."""

    def __init__(self):
        self.outputs, self.states = [], []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if isinstance(outputs, dict):
            ((_, view),) = outputs.items()
            self.outputs.append(view.output.clone())
        else:
            self.outputs.append(outputs[0].clone())
        self.states.append({k: v.clone() for k, v in pl_module.backbone.state_dict().items()})

    on_predict_batch_end = on_test_batch_end


def model(task=Classification, norm=nn.BatchNorm1d, num_outputs=C, **kwargs):
    torch.manual_seed(1)
    module = task(Vectors(norm), num_outputs, **kwargs)
    for layer in module.backbone.layers:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 2)
    return module


def adapted(module, *callbacks, data=None, command="test", **options):
    probe = Probe()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False, callbacks=[*callbacks, probe],
                      **options)  # fmt: skip
    getattr(trainer, command)(module, datamodule=data or Data(), **({"verbose": False} if command == "test" else {}))
    return SimpleNamespace(outputs=torch.cat(probe.outputs), states=probe.states, trainer=trainer)


def batches(data=None, size=32):
    return (data or Data()).x.split(size)


# AdaBN


def test_adabn_has_the_statistics_of_the_whole_set():
    module, data = model(), Data(batch_size=N)
    found = adapted(module, AdaBN(), data=data).states[0]
    first, norm, relu, second, last = module.backbone.layers
    with torch.no_grad():
        a = first(data.x)
        b = second(relu((a - a.mean(0)) / (a.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias))
    for layer, values in ((1, a), (4, b)):
        torch.testing.assert_close(found[f"layers.{layer}.running_mean"], values.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"layers.{layer}.running_var"], values.var(0), rtol=1e-4, atol=1e-5)
    assert last.running_mean is not found["layers.4.running_mean"]


def test_adabn_of_data_sorted_by_class_in_batches():
    module, data = model(), Data(samples=6400, batch_size=32)
    found = adapted(module, AdaBN(), data=data).states[0]
    a = module.backbone.layers[0](data.x).detach()
    torch.testing.assert_close(found["layers.1.running_mean"], a.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["layers.1.running_var"], a.var(0), rtol=1e-2, atol=0)
    assert not torch.allclose(torch.stack([part.var(0) for part in a.split(32)]).mean(0), a.var(0), rtol=1e-2)


def test_adabn_changes_only_the_statistics_and_does_it_before_the_first_batch():
    module = model()
    states = adapted(module, AdaBN()).states
    before = module.backbone.state_dict()
    assert {k for k, v in states[0].items() if not torch.equal(v, before[k])} == {
        f"layers.{i}.{s}" for i in (1, 4) for s in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert all(torch.equal(v, states[-1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("method", [lambda: StochNorm(p=0.9), DSBN])
def test_adabn_of_changed_layers(method):
    plain, changed = adapted(model(), AdaBN()), adapted(model(methods=[method()]), AdaBN())
    torch.testing.assert_close(changed.outputs, plain.outputs)


def test_adabn_sees_no_more_than_is_tested():
    data = Data()
    few = Data()
    few.x = torch.cat([data.x[:64], data.x[64:] + 100])
    limited = {"limit_test_batches": 2}
    torch.testing.assert_close(
        adapted(model(), AdaBN(), data=data, **limited).outputs, adapted(model(), AdaBN(), data=few, **limited).outputs
    )


# TENT


def tent_by_hand(module, lr, steps=1, data=None):
    """As in the authors' code: forward, then step; the last step's predictions count."""
    backbone, head = copy.deepcopy(module.backbone), copy.deepcopy(module.head)
    backbone.train()  # by batch statistics
    affine = [p for i in (1, 4) for p in (backbone.layers[i].weight, backbone.layers[i].bias)]
    optimizer = torch.optim.Adam(affine, lr)
    outputs = []
    for x in batches(data):
        for _ in range(steps):
            output = head(backbone(x))
            loss = -(output.softmax(1) * output.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        outputs.append(output.detach())
    return torch.cat(outputs)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_tent_by_a_loop(steps, inference_mode):
    module = model()
    found = adapted(module, TENT(lr=0.05, steps=steps), inference_mode=inference_mode)
    torch.testing.assert_close(found.outputs, tent_by_hand(module, 0.05, steps), rtol=1e-4, atol=1e-4)


def test_tent_lowers_the_entropy():
    def mean_entropy(lr):
        p = adapted(model(head=nn.Linear), TENT(lr=lr), data=Data(samples=1600)).outputs[800:].softmax(1)
        return torch.special.entr(p).sum(1).mean()

    assert mean_entropy(0.02) < 0.8 * mean_entropy(1e-9)


def test_tent_changes_only_affine_parameters():
    module = model()
    state = adapted(module, TENT(lr=0.05)).states[-1]
    before = module.backbone.state_dict()
    assert {k for k, v in state.items() if not torch.equal(v, before[k])} == {
        f"layers.{i}.{p}" for i in (1, 4) for p in ("weight", "bias")
    }
    assert not any("running" in key for key in state)


def test_tent_of_closed_layers():
    module = model()
    module.requires_grad_(False)
    torch.testing.assert_close(adapted(module, TENT(0.05)).outputs, adapted(model(), TENT(0.05)).outputs)
    assert not any(p.requires_grad for p in module.parameters())


# T3A


def t3a_by_hand(module, k, data=None):
    module = copy.deepcopy(module).eval()
    sets = [[] for _ in range(C)]  # of (entropy, support)
    *before, last = module.head if isinstance(module.head, nn.Sequential) else [module.head]

    def surprise(z):
        return float(torch.special.entr(last(z).softmax(0)).sum())

    outputs = []
    with torch.no_grad():
        for c, row in enumerate(last.weight):
            sets[c].append((surprise(row), row / row.norm()))
        for x in batches(data):
            features = nn.Sequential(*before)(module.backbone(x))
            for z in features:
                sets[int(last(z).argmax())].append((surprise(z), z / z.norm()))
            means = [sum(z for _, z in sorted(s, key=lambda pair: pair[0])[:k]) for s in sets]
            outputs += [torch.stack([z @ (m / m.norm()) for m in means]) for z in features]
    return torch.stack(outputs)


@pytest.mark.parametrize("k", [1, 4, 1000])
def test_t3a_by_a_loop(k):
    module = model()
    found = adapted(module, T3A(filter_k=k))
    torch.testing.assert_close(found.outputs, t3a_by_hand(module, k), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, module.backbone.state_dict()[key]) for key, v in found.states[-1].items())


def test_t3a_behind_hidden_layers():
    module = model(head=partial(MLPHead, hidden=6))
    flat = copy.deepcopy(module)
    *before, flat.head = module.head
    flat.backbone = nn.Sequential(module.backbone, *before)
    outputs = adapted(module, T3A(filter_k=4)).outputs
    torch.testing.assert_close(outputs, t3a_by_hand(flat, 4), rtol=1e-4, atol=1e-4)


# All of them


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_nothing_stays(name, command):
    module = model()
    before, parts = copy.deepcopy(module.state_dict()), (module.backbone, module.head)
    plain = adapted(module, command=command).outputs
    assert not torch.equal(adapted(module, ADAPTATIONS[name](), command=command).outputs, plain)
    assert (module.backbone, module.head) == parts
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert torch.equal(adapted(module, command=command).outputs, plain)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_nothing_stays_of_a_test_that_fails(name):
    class Fails(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            raise RuntimeError("full disk")

    module = model()
    before, parts = copy.deepcopy(module.state_dict()), (module.backbone, module.head)
    with pytest.raises(RuntimeError, match="full disk"):
        adapted(module, ADAPTATIONS[name](), Fails())
    assert (module.backbone, module.head) == parts
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_labels_are_not_seen(name):
    shuffled = Data(Data().y[torch.randperm(N, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(
        adapted(model(), ADAPTATIONS[name]()).outputs, adapted(model(), ADAPTATIONS[name](), data=shuffled).outputs
    )


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_predictions_are_those_of_the_test(name):
    tested = adapted(model(), ADAPTATIONS[name]()).outputs.softmax(1)
    assert torch.equal(tested, adapted(model(), ADAPTATIONS[name](), command="predict").outputs)


def test_adabn_of_a_regression():
    module = model(Regression, num_outputs=1)
    data = Data(labels=torch.randn(N))
    assert not torch.equal(adapted(module, AdaBN(), data=data).outputs, adapted(module, data=data).outputs)


MISTAKES = {
    "adabn without BatchNorm": (AdaBN, {"norm": nn.LayerNorm}, "AdaBN adapts BatchNorm, but the backbone has none"),
    "tent without BatchNorm": (TENT, {"norm": nn.LayerNorm}, "TENT adapts BatchNorm, but the backbone has none"),
    "tent without affine": (TENT, {"norm": lambda n: nn.BatchNorm1d(n, affine=False)}, "affine parameters, but the"),
    "tent of a regression": (TENT, {"task": Regression, "num_outputs": 1}, "class probabilities, which Regression"),
    "t3a of a regression": (T3A, {"task": Regression, "num_outputs": 1}, "class probabilities, which Regression"),
    "t3a of another head": (
        T3A,
        {"head": CosineHead},
        "a head that ends in a torch.nn.Linear, but this run's head is a CosineHead",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_adapted(mistake):
    adaptation, options, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        adapted(model(**options), adaptation())


@pytest.mark.parametrize(("samples", "size"), [(3, 2), (20, 1)])
def test_tent_refuses_a_batch_of_one(samples, size):
    data = Data(samples=samples, batch_size=size)
    with pytest.raises(UserError, match=f"{samples} test samples in batches of {size} leave a batch of one"):
        adapted(model(), TENT(), data=data)
    adapted(model(), AdaBN(), data=data)
    adapted(model(), T3A(), data=data)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: TENT(lr=0), "lr: 0"), (lambda: TENT(steps=0), "steps: 0"), (lambda: T3A(0), "filter_k: 0")],
)
def test_values(make, message):
    with pytest.raises(UserError, match=message):
        make()


def accuracy(output, y):
    return (output.argmax(1) == y).float().mean().item()


def test_adaptation_undoes_a_shift():
    """A trained model, whose inputs are then stretched and moved."""
    data = Data(samples=600, batch_size=60)
    data.x[:, :C] += 3 * F.one_hot(data.y, C)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    data.x, data.y = data.x[order], data.y[order]
    module = model()
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    for _ in range(60):
        loss = F.cross_entropy(module(data.x), data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.zero_grad()
    clean = accuracy(adapted(module, data=data).outputs, data.y)
    moved = Data(batch_size=60)
    moved.x, moved.y = 3 * data.x + 10 * torch.tensor([1, -1, 1, -1, 1]), data.y
    found = {name: accuracy(adapted(module, *each, data=moved).outputs, data.y)
             for name, each in {"plain": [], "adabn": [AdaBN()], "tent": [TENT()]}.items()}  # fmt: skip
    assert clean > 0.9
    assert found["plain"] < 0.8
    assert min(found["adabn"], found["tent"]) > 0.9
