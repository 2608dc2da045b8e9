"""Texts in, classes out, by an encoder of Hugging Face, here a tiny one that starts at random."""

import string

from text_classes import Data as Data
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from tl_modules import TransformerBackbone

BERT = {"model_type": "bert", "vocab_size": 60, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "?"]


def letters():
    """A tokenizer whose tokens are letters."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *string.ascii_letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(8)
    return tokenizer


class Tiny(TransformerBackbone):
    decided_by_schema = ()

    def __init__(self):
        architecture = {**BERT, "num_hidden_layers": 2, "max_position_embeddings": 16}
        super().__init__("tiny", weights=None, windows=2, pooling="attention", architecture=architecture)
        self.prepare.tokenizer = letters()
