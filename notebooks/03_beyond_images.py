# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Beyond images: tables, texts, sound, several inputs
#
# Each kind of data is one data module and one backbone; task, strategies, methods, cache and commands are those of
# images. Everything here comes with the installed packages, so that nothing is downloaded.

# %%
import inspect
import logging
import re
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import polars
import scipy.signal
import scipy.stats
import soundfile
import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from datamodules import AudioFolders, Paired, TabularData, TextFiles
from tl_modules import (
    Classification,
    FeatureExtraction,
    RecurrentBackbone,
    SeveralBackbones,
    SpeechConvNet,
    TabularMLP,
    WordVectors,
)

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
folder = Path(tempfile.mkdtemp())


def train(backbone, data, epochs=10, **options):
    """Trains a classifier; gives its accuracy on the test split."""
    seed_everything(0, verbose=False)
    model = Classification(backbone(), data.schema, **options)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder, **quiet)
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    return metrics["test/accuracy"]


# %% [markdown]
# ## A table
# Files of any usual format, or a frame of polars or pandas. Numbers, dates, categories and gaps are found; means and
# categories are those of the training rows and stay with the model.

# %%
cancer = load_breast_cancer()
frame = polars.DataFrame(cancer.data, schema=list(cancer.feature_names))
frame = frame.with_columns(target=polars.Series(cancer.target_names[cancer.target].tolist()))
for labelled in (20, 100, None):
    data = TabularData(frame, label="target", labelled=labelled)
    print(f"{labelled or 'all'} labelled rows: accuracy {train(TabularMLP, data, epochs=20):.3f}")

# %% [markdown]
# ## Texts, by word vectors of one's own
# The texts are the docstrings of four packages, the label is the package. Vectors are made of all docstrings
# without their labels (by latent semantic analysis, in GloVe's format); files of GloVe and word2vec are read in the
# same way. A whole encoder of Hugging Face is `TransformerBackbone(NAME)`.

# %%
PACKAGES = {"numpy": np, "stats": scipy.stats, "signal": scipy.signal, "torch": torch}


def docstrings(package):
    """The first words of what a package documents, its number of lines, and its share of digits."""
    found = {inspect.getdoc(getattr(package, name)) or "" for name in dir(package) if not name.startswith("_")}
    for text in sorted(found):
        words = re.sub(r"[^a-z ]+", " ", text.lower()).split()
        if len(words) > 20:
            yield " ".join(words[:40]), text.count("\n"), sum(map(str.isdigit, text)) / len(text)


table = polars.DataFrame(
    [(name, *row) for name, package in PACKAGES.items() for row in docstrings(package)],
    schema=["label", "text", "lines", "digits"],
    orient="row",
)
table.write_csv(folder / "docs.csv")
counts = TfidfVectorizer(min_df=2, token_pattern=r"[a-z]+")
matrix = counts.fit_transform(table["text"])
vectors = TruncatedSVD(50, random_state=0).fit(matrix).components_.T
lines = (
    f"{word} {' '.join(f'{value:.4f}' for value in vector)}"
    for word, vector in zip(counts.get_feature_names_out(), vectors / vectors.std(), strict=True)
)
(folder / "vectors.txt").write_text("\n".join(lines) + "\n")
table["label"].value_counts()

# %%
own = folder / "vectors.txt"
for shots in (5, 20):
    data = TextFiles(folder / "docs.csv", shots_per_class=shots)
    pretrained = train(lambda: WordVectors(own), data, 40, finetuning=FeatureExtraction())
    scratch = train(lambda: RecurrentBackbone(WordVectors(own, weights=None)), data, 40)
    print(f"{shots} labels a class: own vectors, frozen {pretrained:.3f}; a GRU from scratch {scratch:.3f}")

# %% [markdown]
# ## Sound
# A folder a class, of any usual format, length and rate; the log-mel front end is the first layer of the backbone.
# These recordings are synthetic: plucked and blown tones of random pitch, in noise.

# %%
generator = np.random.default_rng(0)


def tone(kind, rate=8000):
    """A second of a tone whose overtones die away together, or each the faster the higher it is."""
    time, pitch = np.arange(rate) / rate, generator.uniform(150, 400)
    decay = {"plucked": lambda n: 4.0 * n, "blown": lambda n: 1.0}[kind]
    wave = sum(np.sin(2 * np.pi * pitch * n * time) * np.exp(-decay(n) * time) / n for n in range(1, 8))
    return 0.2 * wave + 0.1 * generator.standard_normal(rate)


for kind in ("plucked", "blown"):
    (folder / "tones" / kind).mkdir(parents=True)
    for number in range(40):
        soundfile.write(folder / "tones" / kind / f"{number}.wav", tone(kind), 8000)
data = AudioFolders(folder / "tones", num_workers=0)
print(f"accuracy {train(SpeechConvNet, data, 40):.3f}")
wave, label = data.domains("train")["target"][0]
plt.figure(figsize=(4, 2), dpi=72)
plt.specgram(wave.numpy(), Fs=8000)
plt.title(data.class_names[label])
plt.show()

# %% [markdown]
# ## Several inputs
# A row of a table that has texts, numbers or paths of images. Each input has its own backbone, and an input that is
# missing is a learnt value.

# %%
data = Paired(folder / "docs.csv", text="text", numbers=["lines", "digits"], label="label", shots_per_class=20)


def both():
    """Frozen word vectors, and a network for numbers."""
    return SeveralBackbones({"text": WordVectors(own), "row": TabularMLP(widths=[8])}, open_stages={"text": 0})


print(f"text and numbers: accuracy {train(both, data, 40):.3f}")

# %% [markdown]
# ## The same from the command line
#
# ```
# tl fit --data TabularData --data.target patients.csv --data.label outcome
# tl fit --data TextFiles --data.target reviews.csv                                  # MiniLM by default
# tl fit --data TextFiles --data.target reviews.csv --model.backbone WordVectors --model.backbone.name glove.txt
# tl fit --data AudioFolders --data.target recordings
# tl fit --data Paired --data.target products.csv --data.text title --data.image photo --data.label category ...
# ```
