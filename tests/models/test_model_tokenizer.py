"""The tokenizers made from GGUF files give the ids that transformers' own conversion gives."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cluster.model_tokenizer import WORD_RULES, Vocabulary, tokenizer_json
from cluster.models import fetch_model
from workers.errors import ModelFileError
from workers.weights.gguf_header import read_header

CORPUS = [
    "What is the capital of France?",
    "It's 12345 o'clock; don't WE'LL I'm they'Ve, 89,012.50 and 0x1F",
    "서울은 대한민국의 수도입니다. 안녕하세요!",
    "中国的首都是北京。你好，世界！ 日本語もどうぞ。",
    "Привет, мир! مرحبا بالعالم नमस्ते दुनिया",
    "def f(x: int) -> int:\n\treturn x**2 + 0x1F  # twelve\n\n\nclass A:\n    pass\n",
    '{"key": [1, 2.5, null], "url": "https://example.org/a?b=c&d=%20"}',
    "😀 👩‍👩‍👧 🇰🇷 é é ñ ﬁ ß",
    "   lead\n\n  \t\t trail   ",
    "\r\n\r\n \n",
    " \u00a0x\u2003y",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|endoftext|> text <|im_",
    "a" * 100 + "\x00\x01\x7f",
    "\ufffd\ufeff",
    " ",
    "",
]


def own(path: Path) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(Vocabulary(read_header(path).metadata)))


def reference(path: Path, folder: Path):
    """transformers' conversion, from a directory in which it finds nothing but the file."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    (folder / "model.gguf").symlink_to(path)
    return PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file="model.gguf")


def test_the_default_model_s_tokenizer_equals_transformers(tmp_path: Path):
    files = fetch_model("default")
    tokenizer, other = Tokenizer.from_file(str(files.tokenizer_json)), reference(files.weights, tmp_path / "r")
    assert tokenizer.get_vocab_size() == len(other) == 49_152
    for text in CORPUS:
        ids = tokenizer.encode(text).ids
        assert ids == other(text).input_ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == ""


def test_every_digit_of_the_default_model_stands_alone():
    """SmolLM2's tokenizer cuts before and after every numeral, also those that are not ASCII; transformers' conversion
    from GGUF leaves that rule out, which shows only behind a space."""
    tokenizer = Tokenizer.from_file(str(fetch_model("default").tokenizer_json))
    space = tokenizer.encode(" ").ids
    for numeral in ("7", "٣", "Ⅷ", "½"):
        assert tokenizer.encode(f" {numeral}").ids == space + tokenizer.encode(numeral).ids


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "smaug-bpe"])
def test_word_rules_equal_transformers(write_gguf, tmp_path: Path, pre: str):
    path = write_gguf(tokenizer__ggml__pre=pre)
    tokenizer, other = own(path), reference(path, tmp_path / "r")
    for text in CORPUS:
        if WORD_RULES[pre].nfc and not unicodedata.is_normalized("NFC", text):
            continue  # Qwen's own tokenizer composes characters, which transformers' conversion leaves out
        cut = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert cut == [piece for piece, _ in other.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)], text
        assert tokenizer.encode(text).ids == other(text).input_ids


@pytest.mark.parametrize("pre", sorted(WORD_RULES))
def test_every_word_rule_keeps_all_text(write_gguf, pre: str):
    tokenizer = own(write_gguf(tokenizer__ggml__pre=pre))
    for text in CORPUS:
        expected = unicodedata.normalize("NFC", text) if WORD_RULES[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == expected


def test_ignoring_merges_takes_a_word_that_is_a_token(write_gguf):
    """Llama 3 has tokens that its merges never build."""
    merges = ["h e", "l l"]
    for pre, expected in [("llama-bpe", ["hello"]), ("smaug-bpe", ["he", "ll", "o"])]:
        path = write_gguf(tokenizer__ggml__pre=pre, tokenizer__ggml__merges=merges)
        assert own(path).encode("hello", add_special_tokens=False).tokens == expected


PIECES = ["▁", "h", "e", "l", "o", "w", "r", "d", "1", "2", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor"]


@pytest.fixture
def sentence_piece(write_gguf):
    """A SentencePiece vocabulary: unknown, beginning, end, 256 bytes, pieces of which the first score best."""

    def write(**changes) -> Path:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
        keys = {
            "tokenizer__ggml__model": "llama",
            "tokenizer__ggml__pre": None,
            "tokenizer__ggml__merges": None,
            "tokenizer__ggml__tokens": tokens,
            "tokenizer__ggml__scores": [0.0] * 259 + [-float(number) for number in range(len(PIECES))],
            "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
            "tokenizer__ggml__unknown_token_id": 0,
            "tokenizer__ggml__add_bos_token": None,
        }
        return write_gguf(**{**keys, **changes})

    return write


def test_sentence_piece_equals_transformers(sentence_piece, tmp_path: Path):
    path = sentence_piece()
    tokenizer, other = own(path), reference(path, tmp_path / "r")
    for text in ["hello world", "hello hello 12", "he\nllo\t1", "héllo 서울 😀", "x", "hell or"]:
        ids = tokenizer.encode(text).ids
        assert ids == other(text).input_ids, text
        assert ids[0] == 1, "a SentencePiece model wants its beginning unless the file says otherwise"
        assert tokenizer.decode(ids) == text


def test_sentence_piece_writes_one_space_before_the_text(sentence_piece):
    tokenizer = own(sentence_piece(tokenizer__ggml__add_bos_token=False))
    assert tokenizer.encode("hello").tokens == ["▁hello"]
    assert tokenizer.encode(" hello").tokens == ["▁", "▁hello"]
    assert tokenizer.decode(tokenizer.encode(" hello").ids) == " hello"
    assert tokenizer.encode("").tokens == []
    bare = own(sentence_piece(tokenizer__ggml__add_bos_token=False, tokenizer__ggml__add_space_prefix=False))
    assert bare.encode("hello").tokens == ["hello"]
    assert bare.decode(bare.encode(" hello").ids) == " hello"


def test_sentence_piece_scores_must_fit(sentence_piece):
    with pytest.raises(ModelFileError, match=r"scores must be as long as tokens \(277\), is 1"):
        own(sentence_piece(tokenizer__ggml__scores=[0.0]))
