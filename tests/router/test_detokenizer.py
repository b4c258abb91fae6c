"""Text comes out as soon as it is certain, and all pieces together are the decoded whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from router.choice import Choice
from router.detokenizer import REPLACEMENT, Detokenizer, StopStrings, TokenTable
from router.tokenizer import Tokenizer
from tests.router.rig import END, byte_tokenizer
from workers.types import Finish, FinishReason

SAMPLES = [
    "the quick brown fox said hello, hello and hello again",
    "안녕하세요 세계, 여러분 안녕",
    "🙂👩‍👩‍👧 flags 🇰🇷 and é ü ß",
    "中文，日本語のテキスト。",
]


def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE whose merges end in the middle of characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    tokenizer.add_tokens([AddedToken("<call> me", special=False)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """What Llama 2 has: words with a mark for their leading space, and bytes for everything else."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁", "world", "▁caf", "é", "ab"]
    vocabulary = [(word, -float(i)) for i, word in enumerate(words)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    words = ["[UNK]", "[END]", "play", "##ing", "un", "##known", "time", "."]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["[UNK]", "[END]"])
    return tokenizer


BYTES, TRAINED, SENTENCEPIECE, WORDS = byte_tokenizer(), trained(), sentencepiece(), word_level()
WRAPPED = {id(tokenizer): Tokenizer(tokenizer) for tokenizer in (BYTES, TRAINED, SENTENCEPIECE, WORDS)}


def detokenizer_of(tokenizer: tokenizers.Tokenizer, *stops: str) -> Detokenizer:
    return WRAPPED[id(tokenizer)].detokenizer(StopStrings(stops) if stops else None)


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    out = []
    for token_id in ids:
        out.append(detokenizer.push(token_id))
        if detokenizer.matched is not None:
            return out
    return [*out, detokenizer.flush()]


def ids_of(tokenizer: tokenizers.Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40)


@given(ids=ids_of(BYTES))
def test_any_bytes_decode_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    assert "".join(pieces(detokenizer_of(BYTES), ids)) == BYTES.decode(ids)


@given(ids=ids_of(TRAINED))
def test_any_tokens_of_a_trained_vocabulary_decode_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    assert "".join(pieces(detokenizer_of(TRAINED), ids)) == TRAINED.decode(ids)


@given(text=st.text(max_size=60) | st.sampled_from(SAMPLES))
def test_text_goes_round(text: str) -> None:
    out = pieces(detokenizer_of(TRAINED), TRAINED.encode(text).ids)
    assert "".join(out) == text
    assert REPLACEMENT not in "".join(out) or REPLACEMENT in text


@given(ids=ids_of(TRAINED))
def test_text_never_changes_once_it_is_out(ids: list[int]) -> None:
    """What has come out is at every moment the beginning of the decoded whole."""
    detokenizer = detokenizer_of(TRAINED)
    whole = TRAINED.decode(ids)
    so_far = ""
    for token_id in ids:
        so_far += detokenizer.push(token_id)
        assert whole.startswith(so_far)


def test_no_half_characters() -> None:
    assert pieces(detokenizer_of(BYTES), "é🙂".encode()) == ["", "é", "", "", "", "🙂", ""]


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    assert pieces(detokenizer_of(BYTES), b"a\xf0\x9f") == ["a", "", "", REPLACEMENT]


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert "".join(pieces(detokenizer_of(BYTES), [104, END, 259, 100_000, 105])) == "hi"


def test_a_special_token_does_not_break_a_character() -> None:
    first, second = "é".encode()
    assert "".join(pieces(detokenizer_of(BYTES), [first, END, second])) == "é"


@given(words=st.lists(st.sampled_from(["▁Hello", "▁", "world", "▁caf", "é", "</s>", "한", "🙂", "ab"]), max_size=20))
def test_byte_fallback_decodes_as_the_tokenizer_does_in_context(words: list[str]) -> None:
    """The tokenizer strips the space at the beginning of a whole text; an answer is not one."""
    ids = []
    for word in words:
        known = SENTENCEPIECE.token_to_id(word)
        ids += [known] if known is not None else [SENTENCEPIECE.token_to_id(f"<0x{b:02X}>") for b in word.encode()]
    context = [SENTENCEPIECE.token_to_id("ab")]
    whole = SENTENCEPIECE.decode(context + ids)
    assert "ab" + "".join(pieces(detokenizer_of(SENTENCEPIECE), ids)) == whole


def test_byte_fallback_streams() -> None:
    ids = [SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in "한글".encode()]
    assert pieces(detokenizer_of(SENTENCEPIECE), ids) == ["", "", "한", "", "", "글", ""]


@given(ids=ids_of(WORDS))
def test_a_decoder_that_joins_words_is_followed_too(ids: list[int]) -> None:
    assert TokenTable.of(WORDS) is None
    assert "".join(pieces(detokenizer_of(WORDS), ids)) == WORDS.decode(ids)


def stops_of(alphabet: str, *, max_size: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.text(alphabet, min_size=1, max_size=max_size), min_size=1, max_size=4)


def reference_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The match that ends first, of those the longest; by trying everything."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=200)
@given(
    text=st.text("ab\n", max_size=30), stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_stop_strings_end_the_text_before_them(text: str, stops: list[str]) -> None:
    detokenizer = detokenizer_of(BYTES, *stops)
    out = pieces(detokenizer, text.encode())
    assert ("".join(out), detokenizer.matched) == reference_stop(text, stops)


@given(
    text=st.text("ab한🙂", max_size=20),
    stops=st.lists(st.text("ab한🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_hold_back_no_more_than_they_must(text: str, stops: list[str]) -> None:
    """After every token the text that is out is all of it, but for an end that a stop string begins with."""
    detokenizer = detokenizer_of(TRAINED, *stops)
    out = ""
    for token_id in TRAINED.encode(text).ids:
        out += detokenizer.push(token_id)
        assert not any(stop in out for stop in stops)
        if detokenizer.matched is not None:
            break
    else:
        out += detokenizer.flush()
    assert (out, detokenizer.matched) == reference_stop(text, stops)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ["END"], ["o", "n", "e", " ", "", "", ""]),
        ("aab", ["ab"], ["", "a", ""]),
        ("EN", ["END"], ["", "", "EN"]),
        ("ENx", ["END"], ["", "", "ENx", ""]),
        ("é!", ["é!"], ["", "", ""]),
    ],
)
def test_what_is_held_back_when(text: str, stops: list[str], expected: list[str]) -> None:
    detokenizer = detokenizer_of(BYTES, *stops)
    assert pieces(detokenizer, text.encode()) == expected


@given(
    st.data(),
    st.sampled_from([BYTES, TRAINED, SENTENCEPIECE, WORDS]),
    st.lists(st.sampled_from(["a", "he", "hello", "é", "ing", "time"]), max_size=3),
    st.integers(0, 5),
)
def test_tokens_in_groups_are_the_same_as_one_by_one(
    data: st.DataObject, tokenizer: tokenizers.Tokenizer, stops: list[str], min_tokens: int
) -> None:
    """Whatever of them goes the quick way: what a step brings says nothing of how the answer is cut."""
    ids = data.draw(ids_of(tokenizer))
    stop_ids = frozenset(data.draw(st.sets(st.sampled_from(ids), max_size=2))) if ids else frozenset()
    cuts = [0, *sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=6))), len(ids)]

    def answer(groups: list[list[int]]) -> tuple[list[int], list[str], str, str | None]:
        detokenizer = detokenizer_of(tokenizer, *stops)
        choice = Choice(detokenizer, stop_token_ids=stop_ids, min_tokens=min_tokens)
        for group in groups:
            num_taken = choice.push(group)
            if choice.finish is not None:
                assert choice.token_ids[-1] == group[num_taken - 1]
                break
            assert num_taken == len(group)
        if choice.finish is None:
            choice.end(Finish(reason=FinishReason.LENGTH))
        assert choice.finish is not None
        return choice.token_ids, choice.pieces, choice.tail, choice.finish.stop

    expected = answer([[token_id] for token_id in ids])
    assert answer([ids[start:end] for start, end in pairwise(cuts) if start < end]) == expected


def test_whole_texts_are_known_at_once_unless_something_is_held_back() -> None:
    """So that this way is taken at all."""
    detokenizer = detokenizer_of(BYTES, "stop")
    assert detokenizer.push_whole(b"abc") == ["a", "b", "c"]
    assert detokenizer.push_whole(b"abs") is None
    assert detokenizer.push(ord("s")) == ""
    assert detokenizer.push_whole(b"abc") is None
    assert detokenizer.push(ord("a")) == "sa"
    assert detokenizer.push_whole(b"a") == ["a"]
    assert detokenizer.push_whole("é".encode()) is None
    assert detokenizer.push_whole([10**9]) is None
