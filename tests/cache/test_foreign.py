"""Networks of other packages are cut without a line for any of them."""

import pytest
import torch
from torch import nn

from tl_modules import Backbone
from tl_modules.batch.samples import Padded
from tl_modules.cache.cut import CannotCut, Cut
from tl_modules.cache.leaves import difference


class Foreign(Backbone):
    """A network and its parts, one stage each."""

    out_features = 1

    def __init__(self, model, *parts):
        super().__init__()
        self.model, self.parts = model, [nn.ModuleList(part) for part in parts]

    def stages(self):
        return self.parts

    def forward(self, x):
        return tuple(self.model(x.float() / 255))


class Encoder(Foreign):
    """Text as token numbers, or speech."""

    def forward(self, x):
        hidden = self.model(x.values, attention_mask=x.mask.long()).last_hidden_state
        lengths = self.model._get_feat_extract_output_lengths(x.lengths) if x.values.is_floating_point() else None
        return x.replace(hidden, lengths)


def exact(backbone, plan, x):
    with torch.no_grad():
        whole = backbone.eval()(x)
        for closed in range(1, len(backbone.stages()) + 1):
            cut = Cut(backbone, closed, plan)
            assert difference(cut.replay(cut.record(x)), whole) < 1e-5, closed


def images(count):
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_pyramids_of_timm(name):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, pretrained=False)
    exact(Foreign(model, *([part] for part in model.children() if next(part.parameters(), None) is not None)),
          images(3), images(2))  # fmt: skip


def test_segmentation_encoders():
    smp = pytest.importorskip("segmentation_models_pytorch")
    e = smp.encoders.get_encoder("resnet18", weights=None)
    backbone = Foreign(e, [e.conv1, e.bn1, e.relu], [e.maxpool, e.layer1], [e.layer2], [e.layer3], [e.layer4])
    exact(backbone, images(3), images(2))


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}


def test_text_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL), add_pooling_layer=False)
    backbone = Encoder(model, [model.embeddings], *([layer] for layer in model.encoder.layer))

    def tokens(*lengths):
        return Padded.of([torch.randint(1, 50, (length,)) for length in lengths])

    exact(backbone, tokens(5, 9, 7, 5), tokens(12, 3, 3, 1))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_speech_of_hugging_face(norm):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", **SMALL, **SPEECH
    )
    model = transformers.Wav2Vec2Model(config)
    first = [model.feature_extractor, model.feature_projection, model.encoder.pos_conv_embed]
    backbone = Encoder(model, first, *([layer] for layer in model.encoder.layers))

    def waves(*lengths):
        return Padded.of([torch.randn(length) for length in lengths])

    if norm == "layer":
        exact(backbone, waves(2000, 3000, 1700), waves(4000, 1000))
    else:  # it sees the padding, with or without a cache
        with pytest.raises(CannotCut, match="differ alone and in a batch"):
            exact(backbone, waves(2000, 3000, 1700), waves(4000, 1000))
