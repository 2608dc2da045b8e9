"""CLIP: its loss by hand, what it is worth by names, and prediction among names; the rest is tested as of every
pretraining."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from small_runs import fit

from datamodules import TransferDataModule
from tl_modules import CLIP, ConvNet, FeatureExtraction, SeveralBackbones, TabularMLP, UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
from text_classes import Bytes

NAMES = ["dark_sky", "grey-wall", "white"]


class Shades(TransferDataModule):
    """Images of three shades, and the shade's name."""

    x_schema, class_names = {"image": {"image": {}}, "text": {"text": {}}}, NAMES

    def domains(self, split):
        draw = torch.Generator().manual_seed(len(split))
        shades = [(0.4 * (i % 3) + 0.05 * torch.rand(3, 8, 8, generator=draw), i % 3) for i in range(24)]
        words = [name.replace("_", " ").replace("-", " ") for name in NAMES]
        return {"target": [({"image": image, "text": words[y]}, y) for image, y in shades]}


def build(**options):
    seed_everything(0, verbose=False)
    backbone = SeveralBackbones({"image": ConvNet(4), "text": Bytes()})
    return CLIP(backbone, schema=Shades().schema, dim=8, **options)


def test_the_loss_is_the_cross_entropy_of_both_directions():
    module = build(temperature=0.5)
    x = module.backbone.prepare([x for x, _ in Shades().domains("train")["target"][:5]])
    one, other = module.eval().project([x])[0]
    torch.testing.assert_close(one.norm(dim=1), torch.ones(5))
    logits = 2 * one @ other.T
    expected = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(module.objective(x)["pairs"], expected)


@pytest.fixture(scope="module")
def trained():
    options = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.03), "lr_scheduler": None}
    module = build(**options)
    trainer = fit(module, Shades(batch_size=8), epochs=20, check_val_every_n_epoch=20)
    return module, trainer


def test_names_tell_the_classes(trained):
    _, trainer = trained
    metrics = trainer.callback_metrics
    assert metrics["val/zero_shot"] > 0.9
    assert 0 < metrics["val/recall_1"] <= metrics["val/recall_5"] <= 1


def test_retrieval_is_the_share_of_texts_whose_own_image_is_near():
    module = build()
    features = torch.randn(6, 24)
    one, other = module.head(features)
    near = other @ one.T
    ranks = [(row > row[i]).sum().item() for i, row in enumerate(near)]
    found = module.measures(features, torch.arange(6) % 3)
    assert found["recall_1"] == pytest.approx(sum(rank < 1 for rank in ranks) / 6)
    assert found["recall_5"] == pytest.approx(sum(rank < 5 for rank in ranks) / 6)


def test_predictions_choose_among_names_that_training_has_not_seen(trained):
    module, trainer = trained
    module.chosen_classes = ["white", "dark sky"]
    found = trainer.predict(module, Shades(batch_size=8))
    prediction = found[0][0] if isinstance(found[0], tuple | list) else found[0]
    columns = module.prediction_columns(prediction)
    assert columns.keys() == {"label", "p_white", "p_dark sky"}
    assert all(
        p + q == pytest.approx(1, abs=1e-5) for p, q in zip(columns["p_white"], columns["p_dark sky"], strict=True)
    )
    darkest = [label for label, i in zip(columns["label"], range(8), strict=True) if i % 3 == 0]
    assert set(darkest) == {"dark sky"}
    vectors = module.embed(["dark_sky", "dark-sky"])
    torch.testing.assert_close(vectors[0], vectors[1])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_the_scale_has_a_limit():
    module = build()
    module.head.log_scale.data.fill_(9.0)
    assert float(module.head.scale) == 100


@pytest.mark.parametrize(("backbone", "options", "message"), [
    (lambda: ConvNet(4), {}, "backbone: CLIP takes SeveralBackbones with two parts"),
    (lambda: SeveralBackbones({"image": ConvNet(4)}), {}, "backbone: CLIP takes SeveralBackbones with two parts"),
    (lambda: SeveralBackbones({"image": ConvNet(4), "text": Bytes()}, "gated"), {}, "and fusion: concat"),
    (lambda: SeveralBackbones({"image": ConvNet(4), "text": Bytes()}), {"prompt": "a"}, "prompt: a has no {}"),
    (lambda: SeveralBackbones({"image": ConvNet(4), "text": Bytes()}), {"temperature": 0.0}, "temperature: 0"),
])  # fmt: skip
def test_refusals(backbone, options, message):
    with pytest.raises(UserError, match=message):
        CLIP(backbone(), schema=Shades().schema, **options)


def test_projections_of_frozen_parts_are_learnt_alone():
    module, start = build(finetuning=FeatureExtraction()), build(finetuning=FeatureExtraction())
    fit(module, Shades(batch_size=12), epochs=2)
    before, after = start.state_dict(), module.state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head"}


def test_prediction_needs_names_and_a_text():
    module = CLIP(SeveralBackbones({"image": ConvNet(4), "row": TabularMLP(5, [4])}))
    with pytest.raises(UserError, match=r"predict: CLIP chooses among names; pass --model\.classes"):
        module.on_predict_start()
