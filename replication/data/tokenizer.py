"""The tokenizer: a byte-level BPE trained on the sources, or any tokenizer.json or hub id."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replication.config import TokenizerConfig
from replication.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
Json = dict[str, Any]  # a tokenizer.json, or a part of one
DROPPED = 1 << 30  # an id that no tokenizer has
WORD = 1000  # characters; longer runs of white space or of anything else are cut before training
LONG_RUN = re.compile(rf"(?<!\S)\S{{{WORD + 1},}}|(?<!\s)\s{{{WORD + 1},}}")
PIECE = re.compile(rf"\S{{1,{WORD}}}(?<=[^\W\d_])(?=[^\w\s])|\S{{1,{WORD}}}|\s{{1,{WORD}}}")


class TextTokenizer:
    """A `tokenizers.Tokenizer` that keeps text and special tokens apart, and cuts and pads nothing.

    `vocab_size` is the largest id plus one; `end_of_text` is the text of the token that joins documents.
    """

    def __init__(self, json_text: str, end_of_text: str):
        """Raise UserError where the text is not a tokenizer.json, or lacks the end-of-text token."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer.path: not a tokenizer.json ({first_line(error)})") from error
        # A tokenizer.json may carry a truncation length or padding; either would change the corpus in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end_of_text_id = tokenizer.token_to_id(end_of_text)
        if end_of_text_id is None:
            added = json.loads(json_text).get("added_tokens", [])
            special = [repr(token["content"]) for token in added if token.get("special")][:20]
            raise UserError(
                f"data.tokenizer.end_of_text: the tokenizer has no token '{end_of_text}'; set it to one of its special "
                f"tokens: {', '.join(special) or 'it has none'}"
            )
        self._tokenizer = tokenizer
        self.end_of_text, self.end_of_text_id = end_of_text, int(end_of_text_id)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        parts = _unspellable(json.loads(tokenizer.to_str()), end_of_text)
        self._encoder = Tokenizer.from_str(json.dumps(parts))
        self._unknown_id, self._telling = _telling(parts, self._encoder)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer, (self.json(), self.end_of_text)

    def json(self) -> str:
        """The content of a tokenizer.json, the same for the same tokenizer."""
        return str(self._tokenizer.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or recognised."""
        return self.encode_counted([text])[0][0]

    def encode_counted(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """encode of each text, and the UTF-8 bytes of each that it does not know: an unknown token's, or no token's.

        Bytes, because one unknown token may stand for a run of any length. Raises UserError for a text that the
        tokenizer knows no token for, not even an unknown one.
        """
        telling = self._telling
        # Only the slower call says which part of a text a token stands for.
        encode = self._encoder.encode_batch if telling is self._encoder else self._encoder.encode_batch_fast
        try:
            encoded = encode(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"data.tokenizer: the tokenizer cannot encode a text ({first_line(error)}); give it an unknown token, "
                "or take one that knows every byte"
            ) from error
        ids, unknown = [e.ids for e in encoded], [0] * len(encoded)
        if telling is not None:
            told = encoded if telling is self._encoder else telling.encode_batch(list(texts), add_special_tokens=False)
            for number, (text, e) in enumerate(zip(texts, told, strict=True)):
                if self._unknown_id in (found := e.ids):
                    # A set: a character that a normalizer took apart is one place in the text.
                    spans = {span for i, span in zip(found, e.offsets, strict=True) if i == self._unknown_id}
                    unknown[number] = sum(len(text[start:end].encode()) for start, end in spans)
        return ids, unknown

    def encode_only(self, texts: Sequence[str]) -> None:
        """The library's part of encode_counted, for measuring what anything else adds."""
        self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))


def _unspellable(parts: Json, end_of_text: str) -> Json:
    """A tokenizer.json that gives texts the same ids, save that none can spell a special token.

    The library can be told to overlook special tokens, but not added ones that are not called special, nor those that
    the model itself finds in its vocabulary: Unigram and WordLevel do, WordPiece and BPE may, in a text or in what a
    normalizer makes of it. So special tokens get names that no text holds. One of a single character keeps its own,
    unless it is the end of text: it is that character.
    """
    model, secret = parts["model"], secrets.token_hex(16)
    special = {t["content"] for t in parts["added_tokens"] if t["special"] and len(t["content"]) > 1} | {end_of_text}

    def name(token: str) -> str:
        return token + secret if token in special else token

    for token in parts["added_tokens"]:
        token["content"] = name(token["content"])
    is_dict = isinstance(model["vocab"], dict)
    entries = model["vocab"].items() if is_dict else model["vocab"]
    model["vocab"] = (dict if is_dict else list)((name(token), value) for token, value in entries)
    if model.get("unk_token") is not None:
        model["unk_token"] = name(model["unk_token"])
    model.pop("dropout", None)  # of merges, at random: no two preparations would be the same
    if "merges" in model:
        inner = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [(a, b) for a, b in model["merges"] if special.isdisjoint((a, b, a + b[inner:]))]
    return {**parts, "post_processor": None}


def _telling(parts: Json, tokenizer: Tokenizer) -> tuple[int, Tokenizer | None]:
    """An id, and a tokenizer that gives it to what this one does not know; no tokenizer where it knows every text.

    That is this one where it has an unknown token. A BPE without one drops characters that it does not know, unless it
    knows the bytes, and gets an unknown token here, DROPPED; the other models fail at them.
    """
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    model = parts["model"]
    vocab, letters = model["vocab"], set(ByteLevel.alphabet())
    has_bytes = bool(model.get("byte_fallback")) and dict(vocab).keys() >= {f"<0x{i:02X}>" for i in range(BYTES)}
    unknown = vocab.get(model.get("unk_token")) if isinstance(vocab, dict) else model.get("unk_id")
    if unknown is not None and not has_bytes:
        return int(unknown), tokenizer
    if has_bytes or model["type"] != "BPE" or vocab.keys() >= letters:
        return DROPPED, None
    name = secrets.token_hex(16)
    model = {**model, "vocab": {**vocab, name: DROPPED}, "unk_token": name, "fuse_unk": False}
    return DROPPED, Tokenizer.from_str(json.dumps({**parts, "model": model}))


def check_tokenizer(config: TokenizerConfig) -> None:
    """Refuse what training could never reach, before anything is read (UserError)."""
    if not config.end_of_text:
        raise UserError("data.tokenizer.end_of_text: is empty; name the token that joins documents")
    if config.path is None and len(config.end_of_text) == 1:
        raise UserError(
            f"data.tokenizer.end_of_text: '{config.end_of_text}' is a character that texts hold; take a longer name"
        )
    if config.path is None and config.vocab_size <= BYTES:
        raise UserError(
            f"data.tokenizer.vocab_size: {config.vocab_size} has no room for the {BYTES} bytes and the end-of-text "
            f"token; take at least {BYTES + 1}"
        )


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> TextTokenizer:
    """Train a byte-level BPE of exactly config.vocab_size entries; the same texts give the same tokenizer.

    Ids: 0 is end-of-text, then the 256 bytes, then merges. Every text round-trips, since every byte has an id. Raises
    UserError where the texts hold too few repeated pairs for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,  # a pair seen once is no evidence; a corpus that runs out of repeated pairs is too small
        special_tokens=[config.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [piece for text in texts for piece in _cut(text)]
    _in_a_thread(lambda: tokenizer.train_from_iterator(sample, trainer=trainer))
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != config.vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size: the corpus yields {reached} entries, {config.vocab_size} are asked for; "
            f"set it (and model.vocab_size) to {reached} or less, or give more text"
        )
    return TextTokenizer(tokenizer.to_str(), config.end_of_text)


def _cut(text: str) -> list[str]:
    """A text in pieces that hold no word of more than WORD characters: training takes time with a word's square.

    A run is cut after a letter that no letter or digit follows, where a word ends anyway, or else within the word.
    """
    cuts = [run.start() + piece.end() for run in LONG_RUN.finditer(text) for piece in PIECE.finditer(run[0])]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def _in_a_thread(work: Callable[[], None]) -> None:
    """Run what the library does without looking for signals in a daemon thread, so that this one hears Ctrl-C."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    done.result()


def tokenizer_file(config: TokenizerConfig) -> Path:
    """The file that a tokenizer's path means, where it is a local one."""
    path = Path(config.folder or "", str(config.path)).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(config: TokenizerConfig) -> TextTokenizer:
    """The tokenizer of config.path: a tokenizer.json, a folder that holds one, or a hub id; UserError without one."""
    assert config.path is not None
    path = tokenizer_file(config)
    if path.is_file():
        try:
            return TextTokenizer(path.read_text(encoding="utf-8"), config.end_of_text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.tokenizer.path: {path} cannot be read ({error})") from error
    if path.suffix == ".json" or path.is_absolute() or config.path.startswith((".", "~")):
        raise UserError(f"data.tokenizer.path: no file {path}; give a tokenizer.json, its folder, or a hub id")
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_pretrained(config.path, revision=config.revision or "main").to_str()
    except Exception as error:  # connection, permission, no such id, offline mode: the hub client's own classes
        raise UserError(
            f"data.tokenizer.path: '{config.path}' is not a local file, and the hub did not give it "
            f"({first_line(error)}); check the name and the network, or download its tokenizer.json and give its path"
        ) from error
    return TextTokenizer(found, config.end_of_text)
