"""Numbers and categories together, in every backbone for tables."""

import pytest
import torch
import yaml

from tl_modules import SCARF, Autoencoder, FTTransformer, TabularMLP, TabularResNet, UserError
from tl_modules.backbones.columns import MixedColumns

SCHEMA = {"numeric": ["a", "b"], "categorical": {"d": ["x", "y"], "c": ["u", "v", "w"]}}
BACKBONES = {
    "MLP": lambda **k: TabularMLP(widths=[8, 6], **k),
    "MLP with embeddings": lambda **k: TabularMLP(widths=[8], embedding=4, **k),
    "ResNet": lambda **k: TabularResNet(2, 8, **k),
    "ResNet with embeddings": lambda **k: TabularResNet(1, 8, embedding=4, **k),
    "FTTransformer": lambda **k: FTTransformer(2, 8, **k),
}


def rows(count=12):
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.arange(count) % 4, torch.arange(count) % 3], 1)  # c, then d
    return {"numeric": torch.randn(count, 2, generator=generator) * 50, "categorical": codes}


def test_a_category_is_a_0_or_1_and_an_unknown_one_nothing():
    columns = MixedColumns(1, [2, 3])
    x = {"numeric": torch.zeros(3, 1), "categorical": torch.tensor([[1, 3], [2, 0], [0, 1]])}
    assert columns.eval()(x).tolist() == [[0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert columns.out_features == 6


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("numeric", [2, 0])
def test_any_columns(name, numeric):
    backbone = BACKBONES[name]()
    x = rows()
    if "embeddings" in name and not numeric:
        pytest.skip("nothing to embed")
    backbone.bind_schema({**SCHEMA, "numeric": SCHEMA["numeric"][:numeric]})
    out = backbone({**x, "numeric": x["numeric"][:, :numeric]})
    assert out.shape == (12, backbone.out_features)
    parameters = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert sorted(parameters) == sorted(map(id, backbone.parameters()))
    plain = BACKBONES[name]()
    plain.bind_schema({"numeric": ["a", "b"]})
    assert plain(x["numeric"]).shape == (12, plain.out_features)


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_come_back_with_the_means_of_the_present_rows(name, tmp_path):
    torch.manual_seed(0)
    trained = BACKBONES[name]()
    trained.bind_schema(SCHEMA)
    trained.train()(rows())
    torch.save(trained.model.state_dict(), tmp_path / "w.pth")
    loaded = BACKBONES[name](weights=tmp_path / "w.pth")
    loaded.bind_schema(SCHEMA)
    assert torch.equal(loaded.eval()(rows()), trained.eval()(rows()))
    counts = [v for key, v in loaded.state_dict().items() if key.endswith("standardise.num_batches_tracked")]
    assert counts == [0]


def test_scarf_swaps_categories_too_and_an_autoencoder_refuses_them():
    module = SCARF(TabularMLP(widths=[8]), schema={"x": SCHEMA}, dim=4)
    assert torch.isfinite(module.objective(rows())["contrast"])
    with pytest.raises(UserError, match="Autoencoder reconstructs numbers, but the data has categories"):
        Autoencoder(TabularMLP(widths=[8]), schema={"x": SCHEMA})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TabularMLP(embedding=-1), "embedding: -1"),
        (lambda: TabularResNet(0), "blocks, width, hidden: 0"),
        (lambda: FTTransformer(7), "blocks, width: 7"),
        (lambda: FTTransformer(2, 12), "blocks, width: 2 must be in 1 to 6, and 12 a multiple of 8"),
        (lambda: TabularMLP(2).bind_schema(SCHEMA), "in_features: 2 for data with 2 columns and 2 of categories"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_a_run_keeps_what_the_columns_are(ok, tmp_path):
    """Also their order, which a config does not keep of mappings."""
    lines = [
        "b,z,job,a,y",
        *(f"{i},{i % 5 or ''},{'xyz'[i % 3]},{7 * i},{'no' if i % 3 else 'yes'}" for i in range(60)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    ok("fit --model Classification --model.backbone TabularMLP --model.backbone.widths [8] --data TabularData "
       "--data.target t.csv --trainer.max_epochs 2 --trainer.logger false --name t")  # fmt: skip
    config = yaml.safe_load((tmp_path / "runs/t/version_0/config.yaml").read_text())
    columns = config["data"]["init_args"]["columns"]
    assert [column["name"] for column in columns["numeric"]] == ["b", "z", "a"]
    assert config["model"]["init_args"]["schema"]["x"]["numeric"] == ["b", "z", "a", "z is missing"]
    before = (tmp_path / "runs/t/version_0/metrics.json").read_text()
    ok("validate --run runs/t")
    assert yaml.safe_load((tmp_path / "runs/t/version_0/metrics.json").read_text())["val/loss"] == pytest.approx(
        yaml.safe_load(before)["val/loss"]
    )
    (tmp_path / "new.csv").write_text("job,b\nx,1\nnew,2\n")
    ok("predict --run runs/t --data.target new.csv --data.label null --out p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 3
