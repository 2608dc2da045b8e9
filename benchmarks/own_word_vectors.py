"""Trains word vectors on your own texts with gensim, in English and in Chinese, and tests them.

    pip install gensim jieba
    python benchmarks/own_word_vectors.py english --data $TL_DATA_DIR   # own/english.txt
    python benchmarks/own_word_vectors.py chinese --data $TL_DATA_DIR   # own/chinese.txt and own/questions.csv

English: film reviews and plots without their labels, for the sentences of `sentence_polarity`. Chinese: sentences and
paragraphs for the questions of XQuAD; the kind of a question (who, when, where, how many, what) is the question word of
its English translation. Each prints the `tl fit` command.
"""

import argparse
import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from datamodules import TextFiles
from tl_modules.backbones.text import jieba_words, words

KINDS = {"who": "who", "whose": "who", "when": "when", "where": "where", "how many": "how many", "what": "what"}
FIT = "tl fit --model Classification --model.backbone WordVectors --model.backbone.name {} --model.head MLPHead"


def train(texts: Iterable[str], cut: Callable[[str], Sequence[str]], file: Path, width: int = 100) -> None:
    """Trains skip-gram vectors of words that occur at least twice, the most frequent ones first."""
    from gensim.models import Word2Vec

    sentences = [[word.lower() for word in cut(text)] for text in texts]
    model = Word2Vec(sentences, vector_size=width, window=5, min_count=2, sg=1, epochs=5, workers=1, seed=0)
    model.wv.save_word2vec_format(str(file))
    print(f"{len(model.wv)} words of {sum(map(len, sentences))} in {file}")


def english(data: Path, out: Path) -> None:
    whole: list[str] = []
    for name in ("movie_reviews", "subjectivity"):
        texts = TextFiles(data / "text" / f"{name}.zip", encoding="latin-1")
        whole += [
            line
            for split in ("train", "val", "test")
            for text, _ in texts.domains(split)["target"]
            for line in text.splitlines()
        ]
    train(whole, words, out / "english.txt")
    target = f"--data TextFiles --data.target {data}/text/sentence_polarity.zip --data.encoding latin-1"
    print(FIT.format(out / "english.txt"), "--model.finetuning FeatureExtraction", target)


def chinese(data: Path, out: Path) -> None:
    def questions(language: str) -> tuple[dict[str, str], list[str]]:
        with gzip.open(data / "xquad" / f"xquad.{language}.json.gz", "rt", encoding="utf-8") as file:
            paragraphs = [p for article in json.load(file)["data"] for p in article["paragraphs"]]
        return {qa["id"]: qa["question"] for p in paragraphs for qa in p["qas"]}, [p["context"] for p in paragraphs]

    (theirs, _), (ours, paragraphs) = questions("en"), questions("zh")
    with gzip.open(data / "parallel" / "eng-cmn_29k.tsv.gz", "rt", encoding="utf-8") as file:
        sentences = [line.split("\t")[1] for line in file]
    train([*sentences, *paragraphs], jieba_words, out / "chinese.txt")
    with (out / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for key, question in theirs.items():
            found = re.match(r"(how many|\w+)", question.lower())
            if found and found[0] in KINDS:
                writer.writerow([ours[key], KINDS[found[0]]])
    target = f"--data TextFiles --data.target {out / 'questions.csv'}"
    print(FIT.format(out / "chinese.txt"), "--model.backbone.tokenizer jieba", target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("language", choices=["english", "chinese"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("own"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    {"english": english, "chinese": chinese}[given.language](given.data, given.out)
