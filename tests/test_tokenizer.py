"""The tokenizer: exact size, lossless, deterministic; special tokens in a text stay text; nothing cut short."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpus import END_OF_TEXT, texts

from replication.config import TokenizerConfig
from replication.data.tokenizer import TextTokenizer, check_tokenizer, load_tokenizer, train_tokenizer
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
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
            assert tokenizer.end_of_text_id not in ids
            assert tokenizer.decode(ids) == text


def test_encoding_adds_no_token_and_batches_agree(trained):
    documents = texts(8)
    assert trained.encode_batch(documents) == [trained.encode(text) for text in documents]
    assert trained.encode("") == []


def test_decoding_shows_or_hides_the_end_of_text(trained):
    ids = [*trained.encode("a b"), trained.end_of_text_id]
    assert trained.decode(ids) == "a b"
    assert trained.decode(ids, skip_special_tokens=False) == f"a b{END_OF_TEXT}"


def test_training_gives_the_same_tokenizer_in_every_process(trained):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "from small_corpus import texts; from test_tokenizer import CONFIG;"
        "from replication.data.tokenizer import train_tokenizer;"
        "sys.stdout.write(train_tokenizer(CONFIG, texts(30)).json())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, encoding="utf-8")
    assert other.stdout == trained.json()


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
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_str(trained.json())
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, trained.end_of_text_id)]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    text = texts(1)[0]
    assert loaded.encode(text) == loaded.encode_batch([text])[0] == trained.encode(text)


def test_what_cannot_be_loaded_is_refused(trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: no file .*missing\.json"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "missing.json")))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: not a tokenizer\.json"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "broken.json")))
    with pytest.raises(UserError, match=r"data\.tokenizer\.end_of_text: .*'</s>'.*<\|endoftext\|>"):
        TextTokenizer(trained.json(), "</s>")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: 'nobody/nothing' is no local file.*network") as caught:
        load_tokenizer(TokenizerConfig(path="nobody/nothing"))
    assert "\n" not in str(caught.value)
