"""What backbones of texts have in common, and the smallest: an average of pretrained word vectors.

    texts -> words -> their numbers (in the loader's workers) -> vectors -> weighted mean
                      Padded (B, L)                              Padded (B, L, D)   (B, D)

What cuts a text into words is any function; the rest is the same for all languages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import Backbone, CarriesText, PretrainedWeights
from tl_modules.backbones.pooling import SequencePooling
from tl_modules.backbones.weights import Pretrained
from tl_modules.backbones.word_vectors import read_vectors
from tl_modules.batch.samples import Padded
from tl_modules.checkpoints.files import fill_in
from tl_modules.errors import UserError

__all__ = ["TextBackbone", "WordVectors"]

Tokenizer = Literal["words", "characters", "jieba"] | Callable[[str], Sequence[str]]
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class TextBackbone(CarriesText, Backbone):
    """A backbone of texts; its forward makes features of tokens or words, Padded (B, L, D)."""

    model: Any  # with `pool`, a SequencePooling, in it, so that it travels with the weights

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Refuses inputs that are not texts.

        Raises:
            UserError: The data says that they are something else.
        """
        self.refuse_others(x, "text", "texts", "; take a backbone for these, or data such as TextFiles")

    def pooled_features(self, features: Any) -> Tensor:
        """Features of tokens or words, Padded (B, L, D) -> (B, D), as `pooling` says."""
        pooled: Tensor = self.model.pool(features)
        return pooled


class NumberedWords:
    """Makes numbers of the words of texts, Padded (B, L); small enough to be sent to a loader's worker.

    Words that have no vector are left out; a text without any other is the one number 0. A word that is not there as
    it is written is looked up in lower case.

    Attributes:
        cut: A text -> its words.
        words: In the order of their numbers, which begin at 1.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.cut = CUTS[tokenizer] if isinstance(tokenizer, str) else tokenizer
        self.know([])

    def know(self, words: list[str]) -> None:
        """Takes these words in place of those before."""
        self.words, self.number = words, {word: place + 1 for place, word in enumerate(words)}

    def __call__(self, texts: Sequence[str]) -> Padded:
        """Texts -> Padded (B, L) of whole numbers."""
        if not self.words:
            raise UserError(
                "width: WordVectors with a width waits for the words of a checkpoint; pass --model.backbone.width null "
                "to read them from the file"
            )
        number = self.number
        found = [[number.get(w) or number.get(w.lower(), 0) for w in self.cut(str(text))] for text in texts]
        return Padded.of([torch.tensor([n for n in numbers if n] or [0]) for numbers in found])


def words(text: str) -> list[str]:
    """Runs of letters and digits, also with an apostrophe within, and single signs."""
    return _WORD.findall(text)


def characters(text: str) -> list[str]:
    """All characters but white space."""
    return [character for character in text if not character.isspace()]


def jieba_words(text: str) -> list[str]:
    """Chinese words by jieba.

    Raises:
        UserError: It is missing.
    """
    try:
        import jieba
    except ImportError as error:
        raise UserError("tokenizer: jieba is missing: pip install 'lightning-transfer[chinese]'") from error
    jieba.setLogLevel("WARNING")
    found: list[str] = jieba.lcut(text)
    return [word for word in found if not word.isspace()]


CUTS: dict[str, Callable[[str], Sequence[str]]] = {"words": words, "characters": characters, "jieba": jieba_words}


class WordVectors(TextBackbone):
    """Averages pretrained word vectors of a text: GloVe, word2vec, gensim's, also trained on texts of one's own.

    A run's checkpoints hold words and vectors, so that it needs the file no more. Vectors are as in the file; a
    strategy decides whether they train.

    Args:
        name: A file of vectors, the most frequent words first: text as of GloVe or word2vec, word2vec's binary, both
            also as .gz, or an .npz with `words` (V,) and `vectors` (V, D).
        weights: DEFAULT takes the file's vectors; or a run of ours, with its words; None random ones for its words.
        strict: Refuse weights that lack a tensor.
        tokenizer: What cuts a text into words: `words` by white space and punctuation, `characters` for languages
            without spaces, `jieba` for Chinese, or a function of your own by its dotted name, text -> list of words.
        pooling: The `mean` of the words' vectors; `sif`, a mean in which a word counts a / (a + p(w)), Arora et al.
            (ICLR 2017), without their common component; or a learnt weighted mean, `attention`.
        max_words: Of the file, so many first words are read; None: all of them.
        vocabulary: A text file; only words that occur in it are read. None: any.
        sif: a of `sif`. Files do not say p(w); by Zipf's law word number r of V has p = 1 / (r (1 + 1/2 + ... + 1/V)).
        width: D; None takes the file's. A run's config has it.

    Raises:
        UserError: The file cannot be read, or a line of it is malformed.
    """

    prepare: NumberedWords
    out_features: int
    decided_by_schema = ("width",)

    def __init__(
        self,
        name: Path | str,
        weights: PretrainedWeights = "DEFAULT",
        strict: bool = True,
        tokenizer: Tokenizer = "words",
        pooling: Literal["mean", "sif", "attention"] = "mean",
        max_words: int | None = 200_000,
        vocabulary: Path | str | None = None,
        sif: float = 1e-3,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.prepare = str(name), NumberedWords(tokenizer)
        self.sif, self.learnt = sif if pooling == "sif" else None, pooling == "attention"
        words: list[str] = []
        vectors = torch.zeros(0, width or 0)
        if weights == "DEFAULT" or (weights is None and width is None):  # a run's checkpoint brings its own
            cut = self.prepare.cut
            words, vectors = read_vectors(name, max_words, None if vocabulary is None else _occurring(vocabulary, cut))
        if weights is None:
            nn.init.normal_(vectors[1:])
        table = nn.Embedding.from_pretrained(vectors, freeze=False)  # type: ignore[no-untyped-call]
        self.model = nn.ModuleDict({"vectors": table})
        self.carried = {"words": words, "width": vectors.shape[1]}
        if weights == "DEFAULT":
            self.pretrained = Pretrained(str(name), {})
        else:
            self.load_pretrained(weights, strict)

    @property
    def carried(self) -> dict[str, Any]:
        """The words, in the order of their vectors, and D."""
        return {"words": self.prepare.words, "width": self.out_features}

    @carried.setter
    def carried(self, given: dict[str, Any]) -> None:
        words, width = given["words"], given["width"]
        self.prepare.know(words)
        shape = (len(words) + 1, width)
        table = cast(nn.Embedding, self.model["vectors"])
        if words and table.weight.shape != shape:  # what fills it comes next
            table.weight.data = table.weight.new_zeros(shape)
            table.num_embeddings, table.embedding_dim = shape
        if "pool" not in self.model or self.out_features != width:
            self.model["pool"] = SequencePooling("attention" if self.learnt else "mean", width)
        self.out_features = width

    def forward(self, x: Padded) -> Padded:
        """Numbers of words, Padded (B, L) -> their vectors, Padded (B, L, D), times the weight that `sif` gives."""
        if not isinstance(x, Padded):
            raise UserError("WordVectors takes texts, and these inputs are none; take data such as TextFiles")
        vectors = self.model["vectors"](x.values)
        if self.sif is not None:
            vectors = vectors * self._counts(x.values, self.sif)[..., None].to(vectors.dtype)
        return x.replace(vectors)

    def _counts(self, numbers: Tensor, a: float) -> Tensor:
        """Gives the weight a / (a + p(w)) of words by their number, which is their rank."""
        total = len(self.prepare.words)
        harmonic = torch.arange(1, total + 1, dtype=torch.float64).reciprocal().sum().item()
        return a / (a + 1 / (numbers.clamp(min=1) * harmonic))

    def stages(self) -> list[nn.Module]:
        """The vectors, and what weighs them where that is learnt."""
        return [self.model["vectors"], self.model["pool"]] if self.learnt else [self.model["vectors"]]


def _occurring(file: Path | str, cut: Callable[[str], Sequence[str]]) -> set[str]:
    """The words of a text file, as they are written and in lower case."""
    path = fill_in(file)
    try:
        with path.open(encoding="utf-8") as lines:
            found = {word for line in lines for word in cut(line)}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary: {path} cannot be read as UTF-8 text ({error})") from error
    return found | {word.lower() for word in found}
