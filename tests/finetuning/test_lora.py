"""Adapters by peft: nothing changes at first, merged is unmerged, peft reads them, and a run with them is a run.

Every method, task, plug-in, cache and resume meets LoRA by the products over strategies.
"""

import copy
import json

import pytest
import torch
from lightning.pytorch import seed_everything
from methods.cases import Several, fit, same
from torch import nn
from torch.nn import functional as F

from tl_modules import (
    DANN,
    Backbone,
    Classification,
    ConvNet,
    FeatureExtraction,
    GradualUnfreezing,
    LastStages,
    LoRA,
    SeveralBackbones,
    TabularMLP,
    TimmBackbone,
    UserError,
)
from tl_modules.checkpoints import contents
from tl_modules.finetuning.lora import adapter_layers

pytest.importorskip("peft")


class Bert(Backbone):
    """A tiny encoder of Hugging Face."""

    out_features = 32

    def __init__(self):
        from transformers import BertConfig, BertModel

        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(vocab_size=50, max_position_embeddings=16, **size)
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, x):
        return self.model(input_ids=x).last_hidden_state.mean(1)

    def stages(self):
        return [self.model.embeddings, *self.model.encoder.layer]


class Torch(Backbone):
    """torch's own transformer layers, whose attention has its projections in one tensor."""

    out_features = 16

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)

    def stages(self):
        return list(self.layers)


def vit():
    return TimmBackbone("test_vit")


CASES = {
    "bert": (Bert, lambda: torch.randint(50, (3, 7)), {}),
    "bert, every linear layer": (Bert, lambda: torch.randint(50, (3, 7)), {"targets": "all-linear"}),
    "bert, DoRA": (Bert, lambda: torch.randint(50, (3, 7)), {"options": {"use_dora": True}}),
    "bert, rank-stabilised": (Bert, lambda: torch.randint(50, (3, 7)), {"options": {"use_rslora": True}}),
    "bert, LoHa": (Bert, lambda: torch.randint(50, (3, 7)), {"kind": "loha"}),
    "bert, IA3": (Bert, lambda: torch.randint(50, (3, 7)), {"kind": "ia3"}),
    "bert, HRA": (Bert, lambda: torch.randint(50, (3, 7)), {"kind": "hra"}),
    "bert, norms": (Bert, lambda: torch.randint(50, (3, 7)), {"kind": "ln_tuning", "targets": ["LayerNorm"]}),
    "timm": (vit, lambda: torch.rand(2, 3, 160, 160), {}),
    "torch": (Torch, lambda: torch.rand(2, 5, 16), {}),
    "torch, linear layers": (Torch, lambda: torch.rand(2, 5, 16), {"targets": ["linear1"]}),
    "convolutions": (lambda: ConvNet(4), lambda: torch.rand(4, 3, 12, 12), {}),
}


def trained(backbone, x, **options):
    """A module after two steps on random labels, in eval mode; and its backbone before LoRA."""
    seed_everything(0, verbose=False)
    before = copy.deepcopy(backbone).eval()
    module = Classification(backbone, 3, finetuning=LoRA(**options)).eval()
    with torch.no_grad():
        assert torch.allclose(module.backbone(x), before(x), atol=1e-5)  # identity at the start
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(module(x), torch.arange(len(x)) % 3).backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
    return module.eval(), before


@pytest.mark.parametrize("case", CASES)
def test_identity_at_first_and_merged_is_unmerged(case):
    make, inputs, options = CASES[case]
    torch.manual_seed(0)
    x = inputs()
    module, before = trained(make(), x, **options)
    frozen = {name.replace(".base_layer", ""): p for name, p in module.backbone.named_parameters()}
    for name, p in before.named_parameters():
        assert torch.equal(frozen[name], p), name
    with torch.no_grad():
        moved = module.backbone(x)
        assert not torch.allclose(moved, before(x), atol=1e-4)
        module.finetuning.merge(module)
        torch.testing.assert_close(module.backbone(x), moved, rtol=1e-5, atol=1e-5)
    assert module.finetuning.merged
    assert module.backbone.state_dict().keys() == before.state_dict().keys()
    assert all(type(a) is type(b) for a, b in zip(module.backbone.modules(), before.modules(), strict=True))


def test_peft_reads_what_is_saved(tmp_path):
    from peft import PeftModel

    x = torch.randint(50, (3, 7))
    module, before = trained(Bert(), x)
    module.finetuning.save_adapters(module.backbone.model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 12_000
    read = PeftModel.from_pretrained(before.model, tmp_path / "adapter").eval()
    expected = module.backbone.model(input_ids=x).last_hidden_state
    torch.testing.assert_close(read(input_ids=x).last_hidden_state, expected)
    module.finetuning.merge(module)
    with pytest.raises(UserError, match="save_adapters: there is no adapter in BertModel, or it was merged"):
        module.finetuning.save_adapters(module.backbone.model, tmp_path / "none")


def build(seed=0, **options):
    seed_everything(seed, verbose=False)
    return Classification(ConvNet(4), 3, **options)


def test_opening_says_where_adapters_are_and_when_they_train():
    module = build(finetuning=LoRA(opening=GradualUnfreezing()))
    stages = module.stages()
    assert [len(module.trainable_stages(epoch)) for epoch in range(4)] == [0, 1, 2, 3]
    module.finetuning.apply(module, 1)
    opened = [any(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert opened == [False, False, True]
    module = build(finetuning=LoRA(opening=LastStages(1)))
    assert [len(list(adapter_layers(stage))) > 0 for stage in module.stages()] == [False, False, True]
    with pytest.raises(UserError, match="LoRA finds no parameter to train in ConvNet"):
        build(finetuning=LoRA(opening=FeatureExtraction()))


def test_one_backbone_of_several_trains_whole():
    backbone = SeveralBackbones({"image": ConvNet(4), "row": TabularMLP(5, [8])})
    module = Classification(backbone, 3, finetuning=LoRA(whole=["parts.image"]))
    image = {id(p) for p in backbone.parts["image"].parameters()}
    assert all(p.requires_grad for p in backbone.parts["image"].parameters())
    assert not list(adapter_layers(backbone.parts["image"]))
    row = [name for name, p in backbone.parts["row"].named_parameters() if p.requires_grad]
    assert row
    assert all("lora_" in name for name in row)
    held = {id(p) for group in module.finetuning.param_groups(module) for p in group["params"]}
    assert image <= held


def test_a_checkpoint_of_what_trains_is_small_and_resumes_to_the_bit(tmp_path):
    def module():
        return build(finetuning=LoRA(opening=GradualUnfreezing()), methods=[DANN()], checkpoint_weights="trainable")

    whole = module()
    fit(whole, Several("image"), tmp_path)
    left_out = whole.finetuning.never_trains(whole)
    kept = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == whole.state_dict().keys() - left_out.keys()
    assert [name for name in kept if "base_layer" in name] == []
    assert any("lora_A" in name for name in kept)
    resumed = module()
    fit(resumed, Several("image"), ckpt_path=tmp_path / "step=5.ckpt")
    assert same(whole.state_dict(), resumed.state_dict()) == []


def test_a_checkpoint_of_merged_weights_is_taken():
    module = build(finetuning=LoRA())
    for p in module.backbone.parameters():
        p.data += 0.01
    x = torch.rand(2, 3, 12, 12)
    module.eval()
    said = module(x)
    module.finetuning.merge(module)
    checkpoint = {"state_dict": module.state_dict()}
    contents.save(module, checkpoint)
    assert checkpoint["merged"]
    other = build(1, finetuning=LoRA())
    contents.restore(other, checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(other.eval()(x), said, rtol=1e-5, atol=1e-5)


def test_through_the_front_door(ok, tmp_path):
    ok("fit --model.backbone.width 4 --model.finetuning LoRA --model.finetuning.r 2 --trainer.max_epochs 1 --name x")
    with pytest.raises(UserError, match=r"holds adapters beside the weights; merge them with tl compress --run RUN"):
        ConvNet(4, tmp_path / "runs/x")
    printed = ok("compress --run runs/x --out merged")
    assert "parameters" in printed
    for run in ("x", "merged"):
        ok(f"test --run runs/{run}")
    one, other = (json.loads((tmp_path / f"runs/{run}/version_0/metrics.json").read_text()) for run in ("x", "merged"))
    assert other["test/loss"] == pytest.approx(one["test/loss"], rel=1e-5)
    ConvNet(4, tmp_path / "runs/merged")


@pytest.mark.parametrize(("options", "message"), [
    ({"r": 0}, "r, alpha, dropout: 0, 16 and 0 must be at least 1, above 0, and in"),
    ({"kind": "lorra"}, "kind: peft has no lorra; it has adalora, "),
    ({"kind": "vera", "targets": "all-linear"}, r"targets: no layer is named all-linear; there are"),
    ({"options": {"rank": 2}}, r"options: peft's lora rejects them .*unexpected keyword argument 'rank'"),
    ({"targets": ["query"]}, r"targets: no layer is named \['query'\]; there are"),
    ({"kind": "boft"}, "finetuning: peft cannot put boft into ConvNet"),
])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        build(finetuning=LoRA(**options))
