"""The base class of text backbones, and the smallest one: an average of pretrained word vectors.

    texts -> words -> their numbers (in the loader's workers) -> vectors -> weighted mean
                      Padded (B, L)                              Padded (B, L, D)   (B, D)

Any function can split a text into words; everything else is the same for all languages.
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
    """A backbone for texts; its forward returns features of tokens or words, Padded (B, L, D)."""

    model: Any  # contains `pool`, a SequencePooling, so that it is saved with the weights

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Rejects inputs that are not texts.

        Raises:
            UserError: The schema names another kind of input.
        """
        self.refuse_others(x, "text", "texts", "; use a backbone for these, or data such as TextFiles")

    def pooled_features(self, features: Any) -> Tensor:
        """Pools features of tokens or words, Padded (B, L, D), to (B, D), by `pooling`."""
        pooled: Tensor = self.model.pool(features)
        return pooled


class NumberedWords:
    """Converts the words of texts to numbers, Padded (B, L); small enough to be pickled for a loader's worker.

    Words without a vector are left out; a text without any known word becomes the single number 0. A word that is
    unknown as written is looked up in lower case.

    Attributes:
        cut: Function from a text to its words.
        words: The words in the order of their numbers, which begin at 1.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.cut = CUTS[tokenizer] if isinstance(tokenizer, str) else tokenizer
        self.know([])

    def know(self, words: list[str]) -> None:
        """Replaces the known words."""
        self.words, self.number = words, {word: position + 1 for position, word in enumerate(words)}

    def __call__(self, texts: Sequence[str]) -> Padded:
        """Maps texts to Padded (B, L) of integers."""
        if not self.words:
            raise UserError(
                "width: WordVectors with a width expects the words from a checkpoint; pass --model.backbone.width null "
                "to read them from the file"
            )
        number = self.number
        found = [[number.get(w) or number.get(w.lower(), 0) for w in self.cut(str(text))] for text in texts]
        return Padded.of([torch.tensor([n for n in numbers if n] or [0]) for numbers in found])


def words(text: str) -> list[str]:
    """Splits into runs of letters and digits, also with an apostrophe inside, and single symbols."""
    return _WORD.findall(text)


def characters(text: str) -> list[str]:
    """Splits into all characters except white space."""
    return [character for character in text if not character.isspace()]


def jieba_words(text: str) -> list[str]:
    """Splits Chinese into words with jieba.

    Raises:
        UserError: jieba is not installed.
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
    """Averages the pretrained vectors of a text's words: GloVe, word2vec, gensim's, or trained on your own texts.

    A run's checkpoints hold words and vectors, so the file is not needed again. Vectors are as in the file; the
    strategy decides whether they train.

    Args:
        name: A file of vectors, the most frequent words first: GloVe's or word2vec's text format, word2vec's binary
            format, both optionally .gz, or an .npz with `words` (V,) and `vectors` (V, D).
        weights: DEFAULT takes the file's vectors; or a run of `tl fit`, with its words; None: random ones for its
            words.
        strict: Rejects weights that lack a tensor.
        tokenizer: How a text is split into words: `words` by white space and punctuation, `characters` for languages
            without spaces, `jieba` for Chinese, or your own function by its dotted name, text -> list of words.
        pooling: The `mean` of the words' vectors; `sif`, a mean in which a word has weight a / (a + p(w)), Arora et al.
            (ICLR 2017), without removal of the common component; or a learnt weighted mean, `attention`.
        max_words: Reads only this many words from the start of the file; None: all of them.
        vocabulary: A text file; only words that occur in it are read. None: all words.
        sif: a of `sif`. Files do not say p(w); by Zipf's law word number r of V has p = 1 / (r (1 + 1/2 + ... + 1/V)).
        width: D; None takes the file's. A run's config records it.

    Raises:
        UserError: The file cannot be read, or has a malformed line.
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
        if weights == "DEFAULT" or (weights is None and width is None):  # a run's checkpoint contains its own
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
        if words and table.weight.shape != shape:  # it is filled next
            table.weight.data = table.weight.new_zeros(shape)
            table.num_embeddings, table.embedding_dim = shape
        if "pool" not in self.model or self.out_features != width:
            self.model["pool"] = SequencePooling("attention" if self.learnt else "mean", width)
        self.out_features = width

    def forward(self, x: Padded) -> Padded:
        """Maps word numbers, Padded (B, L), to their vectors, Padded (B, L, D), times their weights if `sif`."""
        if not isinstance(x, Padded):
            raise UserError("WordVectors takes texts, but the inputs are not; use data such as TextFiles")
        vectors = self.model["vectors"](x.values)
        if self.sif is not None:
            vectors = vectors * self._counts(x.values, self.sif)[..., None].to(vectors.dtype)
        return x.replace(vectors)

    def _counts(self, numbers: Tensor, a: float) -> Tensor:
        """Returns the weight a / (a + p(w)) of words by their number, which is their rank."""
        total = len(self.prepare.words)
        harmonic = torch.arange(1, total + 1, dtype=torch.float64).reciprocal().sum().item()
        return a / (a + 1 / (numbers.clamp(min=1) * harmonic))

    def stages(self) -> list[nn.Module]:
        """Returns the vectors, and a learnt pooling."""
        return [self.model["vectors"], self.model["pool"]] if self.learnt else [self.model["vectors"]]


def _occurring(file: Path | str, cut: Callable[[str], Sequence[str]]) -> set[str]:
    """Returns the words of a text file, as written and in lower case."""
    path = fill_in(file)
    try:
        with path.open(encoding="utf-8") as lines:
            found = {word for line in lines for word in cut(line)}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary: {path} cannot be read as UTF-8 text ({error})") from error
    return found | {word.lower() for word in found}
