"""The tokenizer: exact size, lossless, deterministic; special tokens in a text stay text; nothing cut short."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from paths import SUPPORT
from small_corpus import END_OF_TEXT, texts
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from replication.config import TokenizerConfig
from replication.data.tokenise import tokens_of
from replication.data.tokenizer import (
    TextTokenizer,
    _cut,
    _in_a_thread,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from replication.errors import UserError

CONFIG = TokenizerConfig(vocab_size=400)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CONFIG, texts(30))


def test_the_vocabulary_has_the_size_asked_for(trained):
    assert trained.vocab_size == 400
    assert trained.end_of_text_id == 0
    assert len(set(trained.encode("".join(map(chr, range(1, 300)))))) > 100


def test_every_text_comes_back(trained):
    for text in [
        *texts(5, seed=9),
        "",
        " ",
        "\x00\x7f\u2028",
        "日本語 🙂🙂",
        "tab\tand\r\nline  end  ",
        "never seen: Ωж",
    ]:
        assert trained.decode(trained.encode(text)) == text


def test_a_spelled_out_special_token_stays_text(trained):
    text = f"before{END_OF_TEXT}after"
    for tokenizer in (trained, pickle.loads(pickle.dumps(trained))):
        for ids in (tokenizer.encode(text), tokenizer.encode_counted([text])[0][0]):
            assert tokenizer.end_of_text_id not in ids
            assert tokenizer.decode(ids) == text


LETTERS = "abcdefghijklmnopqrstuvwxyz</>_"
SPELLED = ["a </s> b", "x</s>", "</s></s>", "a＜/s＞b", "A </S> B", "</s>\u0301", "▁</s>▁", "<pad> <unk>", " </s>\n"]


def unigram():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), ("▁a", -3.0), *((c, -4.0) for c in LETTERS)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def word_level():
    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def word_piece():
    known = ["<pad>", "</s>", "<unk>", "a", "b", "x", "##</s>"]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def byte_fallback():
    """As a BPE that was made from a sentencepiece model: merges lead to its special tokens as to any other entry."""
    known = ["<pad>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, "</", "s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    vocab = {token: i for i, token in enumerate(known)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def whole_words():
    """A byte-level BPE that takes a word for its entry without merging."""
    known = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, [], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("make", [unigram, word_level, word_piece, byte_fallback, whole_words])
def test_no_text_becomes_the_end_of_text_in_any_kind_of_tokenizer(make, special):
    made = make()
    made.add_special_tokens(["<pad>"])
    made.add_tokens([AddedToken("</s>", special=special, normalized=not special, lstrip=True)])
    tokenizer = TextTokenizer(made.to_str(), "</s>")
    assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (1, made.get_vocab_size())
    for reader in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        tokens = tokens_of(reader, SPELLED)
        assert (tokens.stream == 1).sum() == len(SPELLED) and 0 not in tokens.stream
    if make in (byte_fallback, whole_words):
        found = [tokenizer.decode(tokenizer.encode(text)) for text in SPELLED]
        assert [text.replace("▁", " ") for text in found] == [text.replace("▁", " ") for text in SPELLED]
    plain = "a b x _ abc"  # what spells no special token has the library's own ids
    assert tokenizer.encode(plain) == made.encode(plain, add_special_tokens=False).ids


def test_a_trained_tokenizer_keeps_its_end_of_text_where_words_spell_it():
    """Training merges letters up to the special token where a word of the texts is its name."""
    config = TokenizerConfig(vocab_size=264, end_of_text="END")
    documents = ["END\nENDING\nhello hello hello"] * 10
    tokenizer = train_tokenizer(config, documents)
    assert (tokens_of(tokenizer, documents).stream == tokenizer.end_of_text_id).sum() == 10
    assert tokenizer.decode(tokenizer.encode(documents[0])) == documents[0]
    with pytest.raises(UserError, match=r"data\.tokenizer\.end_of_text: 'E' is a character that texts hold"):
        check_tokenizer(TokenizerConfig(end_of_text="E"))


def test_added_words_that_are_not_special_stay():
    made = whole_words()
    made.add_tokens([AddedToken("    ", special=False, normalized=False)])
    assert TextTokenizer(made.to_str(), "</s>").encode("a    b") == [68 - 1, made.token_to_id("    "), 68]


def test_an_end_of_text_that_is_the_unknown_token_is_refused_where_it_is_met():
    tokenizer = TextTokenizer(word_level().to_str(), "<unk>")
    assert len(tokens_of(tokenizer, ["a b", "b"]).stream) == 5
    with pytest.raises(UserError, match=r"data\.tokenizer\.end_of_text: '<unk>' is also what the tokenizer makes of"):
        tokens_of(tokenizer, ["a b", "a c"])
    no_unknown = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}))
    with pytest.raises(UserError, match=r"data\.tokenizer: the tokenizer cannot encode a text \(.*UNK.*\); give it"):
        TextTokenizer(no_unknown.to_str(), "</s>").encode("b")


def test_what_a_tokenizer_does_not_know_is_counted():
    letters = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *"ab"])}, []))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters.add_tokens(["a:", "b:"])
    taken_apart = Tokenizer.from_str(letters.to_str())
    taken_apart.normalizer = normalizers.NFD()
    pieces = Tokenizer(models.WordPiece({"</s>": 0, "<unk>": 1, "a": 2, "##a": 3}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    runs = Tokenizer(models.Unigram([("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("b", -1.0), (" ", -1.0)], 1))
    for made, text, expected in (
        (word_level(), "a что да", len("чтода".encode())),
        (letters, "a: b: что да", len("чтода".encode())),
        (taken_apart, "a: 한", len("한".encode())),  # three characters to the model, one of the text
        (pieces, f"a {'a' * 300}", 300),  # one unknown token, as long as the word
        (runs, f"a {'что' * 100} b", len("что".encode()) * 100),  # one for the run
        (byte_fallback(), "a что да", 0),
        (whole_words(), "a что да", 0),
    ):
        tokenizer = TextTokenizer(made.to_str(), "</s>")
        assert tokens_of(tokenizer, ["a", text]).unknown_bytes.tolist() == [0, expected]


def test_encoding_adds_no_token_and_batches_agree(trained):
    documents = texts(8)
    assert trained.encode_counted(documents)[0] == [trained.encode(text) for text in documents]
    assert trained.encode("") == []


def test_decoding_shows_or_hides_the_end_of_text(trained):
    ids = [*trained.encode("a b"), trained.end_of_text_id]
    assert trained.decode(ids) == "a b"
    assert trained.decode(ids, skip_special_tokens=False) == f"a b{END_OF_TEXT}"


def test_training_gives_the_same_tokenizer_in_every_process(trained):
    code = (
        f"import sys; sys.path[:0] = {[str(SUPPORT), str(Path(__file__).parent)]!r}; "
        "from small_corpus import texts; from test_tokenizer import CONFIG;"
        "from replication.data.tokenizer import train_tokenizer;"
        "sys.stdout.write(train_tokenizer(CONFIG, texts(30)).json())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, encoding="utf-8")
    assert other.stdout == trained.json()


def test_words_of_any_length_are_trained_on_in_pieces():
    """Training takes time with the square of a word's length; ordinary text reaches it as it is."""
    for text in (*texts(2), "a" * 1000, "x = 'é'; " * 2000, " " * 999):
        assert _cut(text) == [text]
    for text in ("ACGT" * 1000, "=" * 5000, "a" + " " * 3000 + "b", "if(a)b();" * 1000, f"{'é' * 1001} end"):
        pieces = _cut(text)
        assert "".join(pieces) == text and len(pieces) > 1 and max(map(len, pieces)) <= 1001
    regular = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    script = "go(a,'it's',12)/2;" * 400  # cut where a word ends anyway
    assert [w for piece in _cut(script) for w, _ in regular(piece)] == [w for w, _ in regular(script)]
    train_tokenizer(CONFIG, [*texts(10), "ACGT" * 20_000])


def test_ctrl_c_is_heard_while_the_library_works():
    done = threading.Event()

    def work():
        os.kill(os.getpid(), signal.SIGINT)
        done.wait(60)

    with pytest.raises(KeyboardInterrupt):
        _in_a_thread(work)
    assert not done.is_set()
    done.set()
    with pytest.raises(ZeroDivisionError):
        _in_a_thread(lambda: 1 / 0)


def test_a_corpus_too_small_for_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size: the corpus yields \d+ entries, 2048 are asked"):
        train_tokenizer(TokenizerConfig(vocab_size=2048), ["a short text, a short text"])
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size: 256 has no room"):
        check_tokenizer(TokenizerConfig(vocab_size=256))
    check_tokenizer(TokenizerConfig(vocab_size=257))


def test_loading_a_file_and_a_folder(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.json(), encoding="utf-8")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(TokenizerConfig(path=str(path), vocab_size=999))
        assert loaded.json() == trained.json()
        assert loaded.vocab_size == 400


def test_truncation_padding_and_templates_of_a_loaded_tokenizer_are_off(trained, tmp_path):
    from tokenizers import processors

    raw = Tokenizer.from_str(trained.json())
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, trained.end_of_text_id)]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    text = texts(1)[0]
    assert loaded.encode(text) == loaded.encode_counted([text])[0][0] == trained.encode(text)


def test_what_cannot_be_loaded_is_refused(trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: no file .*missing\.json"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "missing.json")))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: not a tokenizer\.json"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "broken.json")))
    with pytest.raises(UserError, match=r"data\.tokenizer\.end_of_text: .*'</s>'.*<\|endoftext\|>"):
        TextTokenizer(trained.json(), "</s>")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"data\.tokenizer\.path: 'nobody/nothing' is not a local file.*network"
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(TokenizerConfig(path="nobody/nothing"))
    assert "\n" not in str(caught.value)
