"""The former place of the sentence splitter."""

from ponet.tokenizer import split_sentences as split_sentences
from ponet.tokenizer import splitter_version as splitter_version
