"""Dense layers on rows: standardising, stages, freezing, cuts, weights."""

import pytest
import torch
import yaml

import tl_modules
from tl_modules import Classification, FeatureExtraction, LastStages, TabularMLP, UserError
from tl_modules.cache.cut import Cut


def table(rows=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, generator=generator) * torch.tensor([1.0, 1000.0, 0.01]) + torch.tensor(
        [5.0, -2e4, 0.0]
    )


def test_columns_of_any_unit_are_standardised():
    backbone = TabularMLP(3, [])
    x = table()
    backbone.train()(x)  # one step is enough
    out = backbone.eval()(x)
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(out.std(0), torch.ones(3), atol=0.07)  # the 0.01 beside BatchNorm's epsilon
    assert (backbone.out_features, len(backbone.stages())) == (3, 1)


def test_a_column_that_hardly_moves_in_training_does_not_explode_elsewhere():
    backbone = TabularMLP(3, [])
    backbone.train()(table() * torch.tensor([1.0, 1.0, 0.0]))
    assert backbone.eval()(table()).abs().max() <= 5


def test_features_of_a_network_are_divided_by_one_number():
    x = torch.rand(64, 3) * torch.tensor([1.0, 4.0, 10.0])
    backbone = TabularMLP(widths=[])
    backbone.bind_schema({"numeric": ["0", "1", "2"], "one_unit": True})
    backbone.train()(x)
    by_hand = (x - x.mean(0)) / x.var(0).mean().sqrt()
    assert torch.allclose(backbone.eval()(x), by_hand, atol=1e-4)
    by_column = TabularMLP(widths=[], scale="each")
    by_column.bind_schema({"numeric": ["0", "1", "2"], "one_unit": True})
    assert by_column.train()(x).std(0).allclose(torch.ones(3), atol=0.05)


def test_a_column_is_cut_unless_told_otherwise():
    rows, far = torch.randn(500, 2), torch.tensor([[1e4, 0.0]])
    for clip, most in ((5.0, 5.0), (2.0, 2.0), (None, 9e3)):
        backbone = TabularMLP(2, [], scale="each", clip=clip)
        backbone(rows)
        found = backbone.eval()(far)[0, 0]
        assert found == pytest.approx(most) if clip else found > most


@pytest.mark.parametrize("widths", [[8], [8, 6], [8, 6, 4]])
def test_a_stage_for_each_width(widths):
    backbone = TabularMLP(3, widths, dropout=0.5)
    assert backbone.out_features == widths[-1]
    assert backbone.eval()(table()).shape == (64, widths[-1])
    held = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert len(backbone.stages()) == len(widths)
    assert sorted(held) == sorted(id(p) for p in backbone.parameters())
    inside = {id(b) for stage in backbone.stages() for b in stage.buffers()}
    assert {id(b) for b in backbone.buffers()} == inside


def strategies():
    kinds = [s for s in vars(tl_modules).values() if isinstance(s, type) and issubclass(s, tl_modules.FineTuning)]
    return [kind for kind in kinds if kind is not tl_modules.FineTuning]


@pytest.mark.parametrize("strategy", strategies(), ids=lambda s: s.__name__)
def test_what_is_closed_rests(strategy):
    module = Classification(TabularMLP(3, [8, 6]), 2, finetuning=strategy())
    stages = module.backbone.stages()
    for epoch in range(3):
        module.train()
        module.finetuning.apply(module, epoch)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        module.forward_domains({"target": (table(), torch.arange(64) % 2)})["target"].mean_loss.backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        after = module.state_dict()
        trainable = strategy().trainable_stages(epoch, len(stages))
        for number in range(len(stages)):
            keys = [key for key in after if key.startswith(f"backbone.model.{number}.")]
            assert keys
            assert all(torch.equal(before[key], after[key]) for key in keys) == (number not in trainable)


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_cut(closed):
    backbone = TabularMLP(3, [8, 6, 4])
    backbone.train()(table())
    backbone.eval()
    cut = Cut(backbone, closed, table())
    with torch.no_grad():
        torch.testing.assert_close(cut.replay(cut.record(table())), backbone(table()))


def test_weights_bring_their_statistics_and_let_new_ones_replace_them(tmp_path):
    trained = TabularMLP(3, [8])
    for _ in range(20):
        trained.train()(table())
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    loaded = TabularMLP(3, [8], weights=tmp_path / "w.pth")
    assert loaded.pretrained is not None
    assert torch.equal(loaded.eval()(table()), trained.eval()(table()))
    loaded.train()(table() + 100)
    assert torch.allclose(loaded.stages()[0][0].running_mean, (table() + 100).mean(0))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"widths": [0]}, "must be at least 1"),
        ({"in_features": 0}, "must be at least 1"),
        ({"widths": [4, 0]}, "must be at least 1"),
        ({"dropout": 1.0}, r"dropout: 1.0 must be in \[0, 1\)"),
        ({"weights": "DEFAULT"}, "TabularMLP has no hub entry DEFAULT"),
        ({"weights": "nowhere.pth"}, "there is no file or run directory nowhere.pth"),
    ],
)
def test_mistakes(arguments, match):
    with pytest.raises(UserError, match=match):
        TabularMLP(**{"in_features": 3, **arguments})


@pytest.mark.parametrize(("schema", "scale", "widths"), [({}, "each", [256, 256]), ({"one_unit": True}, "all", [256])])
def test_a_table_has_two_layers_and_features_one(schema, scale, widths):
    backbone = TabularMLP()
    backbone.bind_schema({"numeric": ["0", "1", "2"], **schema})
    assert (backbone.scale, backbone.widths, len(backbone.stages())) == (scale, widths, len(widths))


def test_a_runs_config_says_what_the_schema_decided(ok, tmp_path):
    (tmp_path / "a.csv").write_text("\n".join(f"{i % 5},{i % 7},{'ab'[i % 2]}" for i in range(60)))
    ok("fit --model.backbone TabularMLP --data TabularData --data.target a.csv --trainer.max_epochs 1 --name a")
    config = yaml.safe_load((tmp_path / "runs/a/version_0/config.yaml").read_text())
    said = config["model"]["init_args"]["backbone"]["init_args"]
    assert (said["scale"], said["widths"]) == ("each", [256, 256])


def test_runs_from_the_command_line(ok, tmp_path):
    lines = [f"{i % 5},{1000 * (i % 2)},{'ab'[i % 2]}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    backbone = "--model.backbone TabularMLP --model.backbone.in_features 2 --model.backbone.widths [8]"
    data = "--data TabularData --data.target a.csv"
    ok(f"fit {backbone} {data} --trainer.max_epochs 20 --model.optimizer.lr 0.02 --name a")
    assert "test/accuracy" in ok("test --run runs/a")
    ok(f"fit {backbone} {data} --trainer.max_epochs 2 --model.backbone.weights runs/a/version_0 "
       f"--model.finetuning {FeatureExtraction.__name__} --name b")  # fmt: skip
    ok(f"fit {backbone} {data} --trainer.max_epochs 2 --model.finetuning {LastStages.__name__} --name c")
