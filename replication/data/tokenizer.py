"""The tokenizer: a byte-level BPE trained on the sources, or any tokenizer.json or hub id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from replication.config import TokenizerConfig
from replication.data.retries import first_line
from replication.errors import UserError

BYTES = 256
MIN_FREQUENCY = 2  # a pair seen once is no evidence; a corpus that runs out of repeated pairs is too small


class TextTokenizer:
    """A `tokenizers.Tokenizer` that keeps text and special tokens apart, and cuts and pads nothing.

    Attributes:
        vocab_size: entries, i.e. the largest id plus one.
        end_of_text: the text of the token that joins documents.
        end_of_text_id: its id.
    """

    def __init__(self, json_text: str, end_of_text: str):
        """
        Args:
            json_text: content of a tokenizer.json.
            end_of_text: the token that joins documents.

        Raises:
            UserError: the text is no tokenizer, or it lacks the end-of-text token.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer.path: not a tokenizer.json ({first_line(error)})") from error
        # A tokenizer.json may carry a truncation length or padding; either would change the corpus in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Without this, a document that spells a special token, "<|endoftext|>" say, would be given the token itself.
        # It is not part of the file or the pickle, so it is set here and nowhere else.
        tokenizer.encode_special_tokens = True
        end_of_text_id = tokenizer.token_to_id(end_of_text)
        if end_of_text_id is None:
            raise UserError(
                f"data.tokenizer.end_of_text: the tokenizer has no token '{end_of_text}'; set it to one of its special "
                f"tokens: {', '.join(_special_tokens(json_text)) or 'it has none'}"
            )
        self._tokenizer = tokenizer
        self.end_of_text, self.end_of_text_id = end_of_text, int(end_of_text_id)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer, (self.json(), self.end_of_text)

    def json(self) -> str:
        """The content of a tokenizer.json, the same for the same tokenizer."""
        return str(self._tokenizer.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or recognised."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode of each text."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_only(self, texts: Sequence[str]) -> None:
        """The library's part of encode_batch, for measuring what anything else adds."""
        self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))


def check_tokenizer(config: TokenizerConfig) -> None:
    """Refuse what training could never reach, before anything is read.

    Raises:
        UserError: a vocabulary that has no room for the bytes, or an empty end-of-text token.
    """
    if not config.end_of_text:
        raise UserError("data.tokenizer.end_of_text: is empty; name the token that joins documents")
    if config.path is None and config.vocab_size <= BYTES:
        raise UserError(
            f"data.tokenizer.vocab_size: {config.vocab_size} has no room for the {BYTES} bytes and the end-of-text "
            f"token; take at least {BYTES + 1}"
        )


def check_padding(config: TokenizerConfig, tokenizer: TextTokenizer) -> None:
    """Refuse a padded vocabulary that is smaller than the tokenizer's.

    Raises:
        UserError: it is.
    """
    padded = config.padded_vocab_size
    if padded is not None and padded < tokenizer.vocab_size:
        raise UserError(
            f"data.tokenizer.padded_vocab_size: {padded} is less than the {tokenizer.vocab_size} entries that the "
            f"tokenizer has; set it to {tokenizer.vocab_size} or more, or remove it"
        )


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> TextTokenizer:
    """Train a byte-level BPE of exactly config.vocab_size entries; the same texts give the same tokenizer.

    Ids: 0 is end-of-text, then the 256 bytes, then merges. Every text round-trips, since every byte has an id.

    Raises:
        UserError: the texts hold too few repeated pairs for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[config.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != config.vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size: the corpus yields {reached} entries, {config.vocab_size} are asked for; "
            f"set it (and model.vocab_size) to {reached} or less, or give more text"
        )
    return TextTokenizer(tokenizer.to_str(), config.end_of_text)


def load_tokenizer(config: TokenizerConfig) -> TextTokenizer:
    """Load config.path: a tokenizer.json, a folder that holds one, or a hub id.

    Raises:
        UserError: no such file, no access to the hub, not a tokenizer, or no end-of-text token.
    """
    assert config.path is not None
    path = Path(config.path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        try:
            return TextTokenizer(path.read_text(encoding="utf-8"), config.end_of_text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.tokenizer.path: {path} cannot be read ({error})") from error
    if path.suffix == ".json" or path.is_absolute() or config.path.startswith((".", "~")):
        raise UserError(f"data.tokenizer.path: no file {path}; give a tokenizer.json, its folder, or a hub id")
    return TextTokenizer(_hub_json(config.path, config.revision), config.end_of_text)


def _hub_json(name: str, revision: str | None) -> str:
    from tokenizers import Tokenizer

    try:
        return str(Tokenizer.from_pretrained(name, revision=revision or "main").to_str())
    except Exception as error:  # connection, permission, no such id, offline mode: the hub client's own classes
        raise UserError(
            f"data.tokenizer.path: '{name}' is no local file, and the hub did not give it "
            f"({first_line(error)}); check the name and the network, or download its tokenizer.json and give its path"
        ) from error


def _special_tokens(json_text: str) -> list[str]:
    added = json.loads(json_text).get("added_tokens", [])
    return [repr(token["content"]) for token in added if token.get("special")][:20]
