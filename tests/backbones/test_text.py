"""Texts: encoders of Hugging Face, word vectors and recurrent networks; padding and batches change nothing."""

import gzip
import shutil
import sys

import numpy as np
import pytest
import torch
from encoder_fixtures import GLOVE, encoder_folder
from torch import nn

from datamodules import TextFiles
from tl_modules import (
    Classification,
    FeatureExtraction,
    Padded,
    RecurrentBackbone,
    TransformerBackbone,
    UserError,
    WordVectors,
)

LONG = "good film with many words"
TEXTS = ["bad", LONG, "a good film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def glove(tmp_path):
    (tmp_path / "glove.txt").write_text(GLOVE)
    return tmp_path / "glove.txt"


def pooled(backbone, texts):
    backbone.eval()
    with torch.no_grad():
        return backbone.pooled_features(backbone(backbone.prepare(texts)))


def check(backbone, texts=TEXTS, stages=None):
    """Each text gives the same alone and in a batch; the stages hold each parameter once."""
    together = pooled(backbone, texts)
    assert together.shape == (len(texts), backbone.width)
    torch.testing.assert_close(together, torch.cat([pooled(backbone, [text]) for text in texts]))
    held = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert sorted(held) == sorted(map(id, backbone.parameters()))
    assert stages in (None, len(backbone.stages()))


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_encoder(folder, pooling):
    backbone = TransformerBackbone(folder, pooling=pooling)
    check(backbone, stages=3)
    hidden = backbone.model(input_ids=backbone.prepare([LONG]).values).last_hidden_state
    by_hand = hidden[:, 0] if pooling == "cls" else hidden.mean(1)  # attention begins as the mean
    torch.testing.assert_close(pooled(backbone, [LONG]), by_hand)
    assert not backbone.random
    assert TransformerBackbone(folder, weights=None).random


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_long_texts_by_windows(folder, pooling):
    whole = TransformerBackbone(folder, pooling=pooling, max_length=4, windows=3)
    check(whole)
    ids = whole.prepare([LONG]).values[0]
    parts = [whole.model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(4)]
    assert [len(part) for part in parts] == [4, 4, 3]  # five words, two of them in each window
    by_hand = torch.stack([part[0] for part in parts]).mean(0) if pooling == "cls" else torch.cat(parts).mean(0)
    torch.testing.assert_close(pooled(whole, [LONG])[0], by_hand)
    one = TransformerBackbone(folder, pooling=pooling, max_length=4)
    torch.testing.assert_close(pooled(one, [LONG]), pooled(one, ["good film"]))  # what is longer is cut off


def test_attention_learns_from_zero(folder):
    backbone = TransformerBackbone(folder, pooling="attention")
    backbone.pooled_features(backbone(backbone.prepare(TEXTS))).square().sum().backward()
    assert backbone.model.pool.score.weight.grad.any()


def test_a_run_needs_no_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "gone")
    there = TransformerBackbone(tmp_path / "gone", windows=2, max_length=4)
    shutil.rmtree(tmp_path / "gone")
    again = TransformerBackbone(tmp_path / "gone", weights=None, architecture=there.architecture)
    with pytest.raises(UserError, match="has no tokenizer, since its folder is gone"):
        again.prepare(["good"])
    again.load_state_dict(there.state_dict())
    assert torch.equal(pooled(again, TEXTS), pooled(there, TEXTS))


def test_encoder_mistakes(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"no/such could not be|no/such is not a folder, .*hf download no/such --local-dir"
    ):
        TransformerBackbone("no/such")
    with pytest.raises(UserError, match="is not an encoder of Hugging Face"):
        TransformerBackbone(tmp_path)
    with pytest.raises(UserError, match="windows, max_length: 0"):
        TransformerBackbone(folder, windows=0)
    with pytest.raises(UserError, match="DEFAULT stands for the weights of"):
        TransformerBackbone(folder, weights="other")
    with pytest.raises(UserError, match="takes texts, but the data's inputs are image"):
        Classification(TransformerBackbone(folder), {"x": {"image": {}}, "y": {"classes": ["a", "b"]}})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-transfer\[text\]'"):
        TransformerBackbone(folder)


def test_folders_in_which_something_is_missing(tmp_path):
    from transformers import BertConfig, BertModel

    folder = encoder_folder(tmp_path / "m")
    with pytest.raises(UserError, match=r"max_length: .*m takes 16 tokens, fewer than 99; windows read more"):
        TransformerBackbone(folder, max_length=99)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"m is not an encoder of Hugging Face that can be loaded \(.*header"):
        TransformerBackbone(folder)
    (folder / "model.safetensors").write_bytes(whole)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=5, **sizes)).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"the tokens of .*m have numbers up to 10, and its encoder embeds 5; save it"):
        TransformerBackbone(folder)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"m has no tokenizer; tokenizer\.save_pretrained"):
        TransformerBackbone(folder)


def test_positions_that_begin_behind_the_padding(tmp_path):
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    bert = TransformerBackbone(encoder_folder(tmp_path / "m"))
    bert.prepare.tokenizer.no_truncation()  # a tokenizer that says no length
    PreTrainedTokenizerFast(tokenizer_object=bert.prepare.tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "r")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=11, max_position_embeddings=14, pad_token_id=1, type_vocab_size=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "r")
    roberta = TransformerBackbone(tmp_path / "r")
    assert roberta.window == 12
    assert roberta(roberta.prepare(["good " * 40])).values.shape == (1, 12, 8)


def test_through_the_front_door(folder, ok, tmp_path):
    """A run predicts once the encoder's folder is gone, and another one starts from it."""
    shutil.copytree(folder, tmp_path / "encoder")
    (tmp_path / "t.csv").write_text("text,label\n" + "a good film,pos\nbad words,neg\n" * 20)
    (tmp_path / "new.txt").write_text("good\nbad\nmany bad words\n")
    words = "--model Classification --model.backbone TransformerBackbone --model.backbone.name encoder"
    ok(f"fit --name a {words} --data TextFiles --data.target t.csv --trainer.max_epochs 1")
    shutil.rmtree(tmp_path / "encoder")
    ok("predict --run runs/a --data.target new.txt --out p.csv")
    assert [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()] == [
        "id",
        "new.txt:1",
        "new.txt:2",
        "new.txt:3",
    ]
    ok("fit -c runs/a/version_0/config.yaml --model.backbone.weights runs/a --name b --trainer.max_epochs 1")


# Word vectors

WORDS = ["good", "bad", "film", "Film"]
NUMBERS = np.array([[1, 2], [-1, 0.5], [0, 3], [4, 4]], np.float32)


def as_binary(end):
    body = b"".join(w.encode() + b" " + row.tobytes() + end for w, row in zip(WORDS, NUMBERS, strict=True))
    return b"4 2\n" + body


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("glove.txt", GLOVE.encode()),
        ("glove.txt.gz", gzip.compress(GLOVE.encode())),
        ("w2v.txt", b"4 2\n" + GLOVE.replace("\n", " \n").encode()),
        ("w2v.bin", as_binary(b"\n")),
        ("w2v.bin.gz", gzip.compress(as_binary(b""))),
        ("again.txt", (GLOVE + "good 9 9\n").encode()),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_every_form_of_word_vectors(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    backbone = WordVectors(tmp_path / name)
    assert backbone.prepare.words == WORDS
    assert np.array_equal(backbone.model.vectors.weight.detach().numpy(), np.concatenate([np.zeros((1, 2)), NUMBERS]))


def test_word_vectors_as_arrays(tmp_path):
    np.savez(tmp_path / "v.npz", words=np.array(WORDS), vectors=NUMBERS.astype(np.float16))
    check(WordVectors(tmp_path / "v.npz"), ["good", "bad film", "bad good Film"], 1)


def test_only_what_is_needed_is_kept(glove, tmp_path):
    (tmp_path / "texts.txt").write_text("the Bad film\n")
    assert WordVectors(glove, max_words=2).prepare.words == ["good", "bad"]
    assert WordVectors(glove, vocabulary=tmp_path / "texts.txt").prepare.words == ["bad", "film"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good 1 2\nbad 1\n", "line 2 has 1 numbers, not 2"),
        (b"good 1 2\nbad 1 x2\n", "line 2 has a value that is not a number"),
        (b"good 1 2\nbad 1 nan\n", "line 2 has a number that is not finite"),
        (b"2 2\ngood 1 2\nb\xffd 1 2\n", "line 3 begins with bytes that are not UTF-8"),
        (as_binary(b"\n")[:-5], "word 4 of 4 is cut off"),
        (b"good\n", "line 1 has no word and numbers"),
        (b"", "line 1 has no word and numbers"),
    ],
)
def test_malformed_word_vectors(content, message, tmp_path):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(UserError, match=message):
        WordVectors(tmp_path / "v")


def test_means_by_hand(glove):
    text = "good Bad xyz film"  # Bad is found in lower case, xyz nowhere
    v = torch.tensor(NUMBERS)
    torch.testing.assert_close(pooled(WordVectors(glove), [text])[0], (v[0] + v[1] + v[2]) / 3)
    assert pooled(WordVectors(glove), ["xyz", ""]).tolist() == [[0, 0], [0, 0]]
    p = 1 / (torch.arange(1, 5) * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    weighted = (0.1 / (0.1 + p))[:3, None] * v[:3]
    torch.testing.assert_close(pooled(WordVectors(glove, pooling="sif", sif=0.1), [text])[0], weighted.mean(0))
    check(WordVectors(glove, pooling="attention"), ["good", "bad film"], 2)


def test_random_vectors_have_the_words_of_the_file(glove):
    backbone = WordVectors(glove, weights=None)
    assert backbone.random
    assert backbone.prepare.words == WORDS
    assert not torch.equal(backbone.model.vectors.weight[1:], torch.tensor(NUMBERS))


def test_words_travel_with_a_run(glove, ok, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "good film,pos\nbad,neg\n" * 20)
    model = f"--model Classification --model.head MLPHead --model.backbone WordVectors --model.backbone.name {glove}"
    ok(f"fit --name a {model} --data TextFiles --data.target t.csv --trainer.max_epochs 2")
    model = f"--model Classification --model.backbone RecurrentBackbone --model.backbone.inputs WordVectors --model.backbone.inputs.name {glove}"
    ok(f"fit --name r {model} --model.backbone.width 4 --data TextFiles --data.target t.csv --trainer.max_epochs 1")
    glove.unlink()
    ok("test --run runs/a")
    ok("test --run runs/r")
    config = "-c runs/a/version_0/config.yaml --model.backbone.weights runs/a"
    ok(f"fit {config} --model.finetuning FeatureExtraction --name b --trainer.max_epochs 1")


@pytest.mark.tensorboard
def test_the_projector_shows_texts(glove, ok, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "good film,pos\nbad,neg\n" * 20)
    model = f"--model Classification --model.backbone WordVectors --model.backbone.name {glove}"
    ok(f"fit --name a {model} --data TextFiles --data.target t.csv --trainer.max_epochs 1")
    (file,) = (tmp_path / "runs/a").rglob("val_features/metadata.tsv")
    assert {"label\ttext", "pos\tgood film", "neg\tbad"} == set(file.read_text().splitlines())


def test_any_tokenizer(glove, tmp_path):
    glove.write_text("电 1 2\n影 3 4\n电影 5 6\n")
    assert WordVectors(glove, tokenizer="characters").prepare(["电影 好"]).values.tolist() == [[1, 2]]
    assert WordVectors(glove, tokenizer=lambda text: text.split("|")).prepare(["电影|影"]).values.tolist() == [[3, 2]]


def test_chinese_words(glove, monkeypatch):
    pytest.importorskip("jieba")
    glove.write_text("电影 5 6\n")
    assert WordVectors(glove, tokenizer="jieba").prepare(["这个电影好看"]).values.tolist() == [[1]]
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-transfer\[chinese\]'"):
        WordVectors(glove, tokenizer="jieba").prepare(["电影"])


# Recurrent networks


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_layers_see_no_padding(glove, cell):
    backbone = RecurrentBackbone(WordVectors(glove), width=6, layers=2, cell=cell, pooling="attention")
    check(backbone, ["good", "bad film good", "xyz", "film film"], 3)


def test_series():
    backbone = RecurrentBackbone(width=4, bidirectional=False)
    backbone.bind_schema({"series": ["a", "b"]})
    long, short = torch.randn(5, 2), torch.randn(3, 2)
    check(backbone, [long, short], 1)
    states, _ = nn.GRU.forward(backbone.model["layers"][0].cell, short[None])
    torch.testing.assert_close(pooled(backbone, [short]), states.mean(1))
    one = RecurrentBackbone(in_features=1, width=4)
    torch.testing.assert_close(pooled(one, [long[:, 0]]), pooled(one, [long[:, :1]]))
    assert isinstance(one(torch.zeros(2, 3)), Padded)


def test_recurrent_mistakes(glove):
    with pytest.raises(UserError, match="the number of columns of the series is unknown"):
        RecurrentBackbone().bind_schema({"text": {}})
    with pytest.raises(UserError, match="in_features: 3 for series with 2 columns"):
        RecurrentBackbone(in_features=3).bind_schema({"series": ["a", "b"]})
    with pytest.raises(UserError, match="width even if bidirectional"):
        RecurrentBackbone(in_features=3, width=5)
    with pytest.raises(UserError, match="takes texts, but the data's inputs are image"):
        RecurrentBackbone(WordVectors(glove)).bind_schema({"image": {}})


def test_frozen_word_vectors_below_a_network_that_trains(glove, tmp_path):
    from small_runs import fit

    (tmp_path / "t.csv").write_text("text,label\n" + "good film,pos\nbad,neg\n" * 20)
    data = TextFiles(tmp_path / "t.csv", batch_size=8)
    found = {}
    for cached in (False, True):
        torch.manual_seed(0)
        backbone = RecurrentBackbone(WordVectors(glove), width=4)
        module = Classification(backbone, data.schema, finetuning=FeatureExtraction())
        trainer = fit(module, data, cached=cached)
        found[cached] = float(trainer.callback_metrics["val/loss"])
    assert found[True] == pytest.approx(found[False], rel=1e-5)
