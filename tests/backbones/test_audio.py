"""Backbones for recordings: the front end against references, no padding seen, stages, rates, loaders, encoders."""

import numpy as np
import pytest
import torch
from torch import nn

from tl_modules import (
    AudioTransformer,
    Classification,
    ConvNet,
    FeatureExtraction,
    LastStages,
    LogMel,
    SpecAugment,
    Spectrogram,
    SpeechConvNet,
    TabularMLP,
    TorchBackbone,
    UserError,
)
from tl_modules.backbones.audio_frontend import Resample, Standardised
from tl_modules.cache.cut import Cut

SCHEMA = {"x": {"audio": {"rate": 8000}}, "y": {"classes": ["no", "yes"]}}
LOADER = """
import torch
from torch import nn
class Alone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, width, 40, 20), nn.ReLU(), nn.Conv1d(width, width, 4, 2))
    def forward(self, waves):
        return self.layers(waves[:, None]).transpose(1, 2)
class Together(Alone):
    def forward(self, waves, lengths):
        return super().forward(waves), ((lengths - 40) // 20 + 1 - 4) // 2 + 1
class Vector(Alone):
    def forward(self, waves):
        return super().forward(waves).mean(1)
def alone(width=3):
    return Alone(width)
def together(width=3):
    return Together(width)
def vector(width=3):
    return Vector(width)
def number():
    return 3
"""


def waves(lengths=(900, 1600, 1205)):
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def pooled(backbone, rows):
    with torch.no_grad():
        return backbone.pooled_features(backbone(backbone.prepare(rows)))


def check(backbone, rate=8000, cut_within=True):
    """Outputs depend neither on batch nor on padding; every cut reproduces them; the stages hold each parameter once."""
    backbone.bind_schema({"audio": {"rate": rate}})
    backbone.eval()
    together = pooled(backbone, waves())
    alone = torch.cat([pooled(backbone, [wave]) for wave in waves()])
    assert together.shape == (3, backbone.width)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4
    held = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert sorted(held) == sorted(map(id, backbone.parameters()))
    x = backbone.prepare(waves())
    for closed in range(1 if cut_within else len(backbone.stages()), len(backbone.stages()) + 1):
        cut = Cut(backbone, closed, x, pooled=True)
        with torch.no_grad():
            torch.testing.assert_close(cut.replay(cut.record(x)), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("norm", [False, True])
def test_log_mel_is_that_of_a_reference_implementation(scale, norm):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    wave = waves((4000,))[0]
    ours = LogMel(16000, 40, n_fft=512, low=20, high=7600, scale=scale, norm=norm)
    filters = audio_utils.mel_filter_bank(257, 40, 20, 7600, 16000, "slaney" if norm else None, scale)
    reference = audio_utils.spectrogram(
        wave.numpy(),
        audio_utils.window_function(400, "hann"),
        400,
        160,
        512,
        power=2.0,
        pad_mode="constant",
        mel_filters=filters,
        log_mel="log",
        mel_floor=1e-6,
    )
    assert np.abs(ours(wave[None])[0].numpy() - reference.T).max() < 1e-4
    assert reference.shape[1] == ours.frames(4000)


def test_a_tone_lies_in_its_band():
    mel = LogMel(8000, 20)
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 8000)
    band = mel(tone[None])[0, 50].argmax()
    centres = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + 4000 / 700), 22)[1:-1] / 2595) - 1)
    assert (centres - 1000).abs().argmin() == band


def test_bands_are_standardised_over_the_recording_alone():
    bands, inside = torch.randn(2, 30, 4) * 3 + 5, torch.arange(30) < torch.tensor([[30], [12]])
    found = Standardised()(bands, inside)
    for row, length in zip(found, (30, 12), strict=True):
        assert row[:length].mean(0).abs().max() < 1e-5
        assert (row[:length].std(0, unbiased=False) - 1).abs().max() < 1e-5
        assert not row[length:].any()


def test_spec_augment_hides_shares_in_training_only():
    bands, lengths = torch.ones(64, 50, 20), torch.full((64,), 50)
    layer = SpecAugment(masks=2, time=0.2, frequency=0.3)
    assert layer.eval()(bands, lengths) is bands
    hidden = layer.train()(bands, lengths) == 0
    assert 0 < hidden.all(2).sum(1).max() <= 2 * 11  # whole frames
    assert 0 < hidden.all(1).sum(1).max() <= 2 * 7  # whole bands
    assert (hidden == (hidden.all(2, keepdim=True) | hidden.all(1, keepdim=True))).all()
    assert SpecAugment(masks=0)(bands, lengths) is bands


def test_spec_augment_rests_with_the_first_stage():
    for strategy, moves in ((LastStages(1), False), (LastStages(3), True)):
        module = Classification(SpeechConvNet(4, 3, mels=4), SCHEMA, finetuning=strategy)
        module.train()
        module.finetuning.apply(module, 0)
        assert module.backbone.augment.training == moves


def test_the_small_network_sees_no_padding():
    check(SpeechConvNet(4, 3, mels=8))


@pytest.mark.parametrize("size", [None, 32])
def test_an_image_backbone_on_spectrograms(size):
    backbone = Spectrogram(ConvNet(4), seconds=0.15, image_size=size, mels=16)
    check(backbone)
    assert backbone.random
    seen = []
    backbone.inner.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    pooled(backbone, waves((800, 8000)))
    assert seen[0].shape == (2, 1, *((size, size) if size else (16, 16)))
    assert 0 <= seen[0].min() < seen[0].max() <= 1


def test_rates_are_the_datas_or_resampled_to_ones_own(caplog):
    pytest.importorskip("soxr")
    caplog.set_level("INFO")
    free, fixed = SpeechConvNet(4), SpeechConvNet(4, rate=16000)
    for backbone, rate, count in ((free, 8000, 900), (fixed, 16000, 1800)):
        backbone.bind_schema({"audio": {"rate": 8000}})
        assert (backbone.rate, int(backbone.prepare(waves()).lengths[0])) == (rate, count)
    assert "recordings are resampled from 8000 to 16000 Hz, the rate of SpeechConvNet" in caplog.text
    tone = torch.sin(2 * torch.pi * 300 * torch.arange(8000) / 8000)
    wanted = torch.sin(2 * torch.pi * 300 * torch.arange(16000) / 16000)
    assert (Resample(8000, 16000).one(tone) - wanted)[500:-500].abs().max() < 1e-2


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="SpeechConvNet takes recordings, but the data's inputs are numeric"):
        Classification(SpeechConvNet(4), {"x": {"numeric": ["a"]}, "y": {"classes": ["b", "c"]}})
    with pytest.raises(UserError, match="rate: the data does not state"):
        Classification(SpeechConvNet(4), 2)
    with pytest.raises(UserError, match="takes recordings, but the inputs are not"):
        SpeechConvNet(4, rate=8000)(torch.zeros(2, 100))
    with pytest.raises(UserError, match=r"a recording must be a waveform \(T,\)"):
        Resample()([torch.zeros(2, 100)])
    with pytest.raises(UserError, match="needs an image backbone, not TabularMLP"):
        Spectrogram(TabularMLP(3))
    for wrong in ({"mels": 0}, {"high": 9000}, {"low": 5000}):
        with pytest.raises(UserError, match="do not fit 8000 samples per second"):
            LogMel(8000, **wrong)
    for make in (lambda: SpeechConvNet(4, kernel=4), lambda: Spectrogram(ConvNet(4), seconds=0),
                 lambda: SpecAugment(time=2), lambda: SpeechConvNet(4, rate=0)):  # fmt: skip
        with pytest.raises(UserError):
            make()


@pytest.mark.parametrize("name", ["alone", "together", "vector"])
def test_a_module_of_ones_own_loader(name, module_file):
    module_file("my_speech", LOADER)
    backbone = TorchBackbone(f"my_speech.{name}", {"width": 5})
    check(backbone, cut_within=name == "together")  # one by one, it is called as often as there are recordings
    assert (backbone.out_features, len(backbone.stages()), backbone.random) == (5, 2, False)


@pytest.mark.parametrize(("loader", "message"), [
    ("my_speech.nothing", "loader: my_speech.nothing cannot be imported"),
    ("no_such_module.x", "loader: no_such_module.x cannot be imported"),
    ("alone", "loader: alone cannot be imported"),
    ("my_speech.__name__", "loader: my_speech.__name__ is not a function"),
    ("my_speech.number", "returns a int, not a torch.nn.Module"),
])  # fmt: skip
def test_a_loader_that_is_none(loader, message, module_file):
    module_file("my_speech", LOADER)
    with pytest.raises(UserError, match=message):
        TorchBackbone(loader)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Random tiny encoders as `save_pretrained` writes them."""
    hf, root = pytest.importorskip("transformers"), tmp_path_factory.mktemp("encoders")
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (4, 4), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2,
                    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    whisper = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 8,
               "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 50,
               "vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    made = {
        "wav2vec2": (hf.Wav2Vec2Model(hf.Wav2Vec2Config(**small, **convolutions)), hf.Wav2Vec2FeatureExtractor()),
        "hubert": (
            hf.HubertModel(hf.HubertConfig(**small, **convolutions, feat_extract_norm="layer", layerdrop=0.5)),
            hf.Wav2Vec2FeatureExtractor(),
        ),
        "whisper": (
            hf.WhisperModel(hf.WhisperConfig(**whisper)),
            hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        ),
        "ast": (
            hf.ASTModel(hf.ASTConfig(**small, max_length=32, num_mel_bins=16)),
            hf.ASTFeatureExtractor(max_length=32, num_mel_bins=16),
        ),
    }
    for name, (model, extractor) in made.items():
        model.save_pretrained(root / name)
        extractor.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "whisper", "ast"])
def test_an_encoder_of_hugging_face(name, encoders):
    pytest.importorskip("soxr")
    backbone = AudioTransformer(encoders / name)
    check(backbone)
    assert (backbone.width, len(backbone.stages()), backbone.random) == (8, 3, False)
    rebuilt = AudioTransformer("gone", None, architecture=backbone.architecture, extractor=backbone.extractor)
    rebuilt.load_state_dict(backbone.state_dict())
    rebuilt.bind_schema({"audio": {"rate": 8000}})
    assert torch.equal(pooled(rebuilt.eval(), waves()), pooled(backbone, waves()))


def test_an_encoder_says_what_hugging_face_says(encoders):
    from transformers import AutoModel

    backbone = AudioTransformer(encoders / "wav2vec2").eval()
    backbone.bind_schema({"audio": {"rate": 16000}})
    x = backbone.prepare(waves((1600,)))
    with torch.no_grad():
        reference = AutoModel.from_pretrained(encoders / "wav2vec2").eval()(x.values).last_hidden_state
        torch.testing.assert_close(backbone(x).values, reference, rtol=1e-4, atol=1e-5)
        assert backbone(backbone.prepare([torch.ones(5)])).values.isfinite().all()  # shorter than a frame


def test_an_encoder_that_cannot_be_had(tmp_path, encoders):
    with pytest.raises(UserError, match="without a network, run `hf download nobody/nothing"):
        AudioTransformer("nobody/nothing")
    with pytest.raises(UserError, match="is not an encoder of Hugging Face that can be loaded"):
        AudioTransformer(tmp_path)


def test_an_encoder_trains(encoders):
    module = Classification(AudioTransformer(encoders / "wav2vec2"), SCHEMA, finetuning=LastStages(1))
    module.train()
    module.finetuning.apply(module, 0)
    x = module.backbone.prepare(waves())
    module.forward_domains({"target": (x, torch.tensor([0, 1, 0]))})["target"].mean_loss.backward()
    assert all(p.grad is not None for p in module.backbone.stages()[-1].parameters())
    frozen = Classification(AudioTransformer(encoders / "ast"), SCHEMA, finetuning=FeatureExtraction())
    assert not isinstance(frozen.backbone.stages()[0], nn.Identity)
