"""Makes a tokenizer.json out of the vocabulary inside a GGUF file.

Two vocabularies are known: "gpt2" (byte-level BPE with merges) and "llama" (SentencePiece BPE with byte fallback, whose
merges follow from the scores). How a byte-level vocabulary cuts text into words before merging is named by
`tokenizer.ggml.pre`; an unknown name is refused, because a wrong cut gives wrong ids without any other sign.
The result is checked against transformers' own conversion in the tests; transformers itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from workers.errors import ModelFileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Applied one after the other, each inside the pieces of the one before; for files whose maker chose no rule.
UNNAMED = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


class WordRule(NamedTuple):
    """How text is cut into words: digits first where `single_digits`, then by each of `patterns`."""

    patterns: tuple[str, ...]
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""
    adds_bos: bool = False
    """Where the file does not say."""


_LLAMA3_RULE = WordRule((LLAMA3,), ignore_merges=True, adds_bos=True)
_SINGLE_DIGITS_RULE = WordRule((GPT2,), single_digits=True)
_QWEN2_RULE = WordRule((QWEN2,), nfc=True)

WORD_RULES: Mapping[str, WordRule] = {
    "default": WordRule(UNNAMED),
    "gpt-2": WordRule((GPT2,)),
    "smollm": _SINGLE_DIGITS_RULE,
    "starcoder": _SINGLE_DIGITS_RULE,
    "refact": _SINGLE_DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "smaug-bpe": WordRule((LLAMA3,)),
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": WordRule((TEKKEN,), ignore_merges=True, adds_bos=True),
}


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """Return the text of a tokenizer.json. Raises ModelFileError naming the key, the rule and the value."""
    kind = vocabulary.kind
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise ModelFileError(f"tokenizer.ggml.model must be gpt2 or llama, is {kind!r}")
    _add_tokens(tokenizer, vocabulary)
    _add_post_processor(tokenizer, vocabulary)
    return str(tokenizer.to_str())


class Vocabulary:
    """The tokenizer keys of a GGUF file's metadata, checked. Raises ModelFileError."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.kind = self._get("model", str)
        self.tokens: Sequence[str] = self._get("tokens", list)
        if not self.tokens:
            raise ModelFileError("tokenizer.ggml.tokens must not be empty")
        self.types: Sequence[int] = self._get("token_type", list, [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise ModelFileError(
                f"tokenizer.ggml.token_type must be as long as tokens ({len(self.tokens)}), is {len(self.types)}"
            )
        self.ids = {token: index for index, token in enumerate(self.tokens)}

    def _get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise ModelFileError(f"tokenizer.ggml.{name} is missing: the file has no tokenizer that can be used")
        if not isinstance(value, kind):
            raise ModelFileError(f"tokenizer.ggml.{name} must be a {kind.__name__}, is {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._get(name, bool, default))

    def token_id(self, name: str) -> int | None:
        """Return `tokenizer.ggml.<name>_token_id`, or None where the file has none."""
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ModelFileError(f"tokenizer.ggml.{name}_token_id must be in [0, {len(self.tokens)}), is {value!r}")
        return value

    @property
    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for number, text in enumerate(self._get("merges", list)):
            left, space, right = str(text).partition(" ")
            if not (left and space and right) or left + right not in self.ids:
                raise ModelFileError(f"tokenizer.ggml.merges[{number}] must be two tokens, is {text!r}")
            pairs.append((left, right))
        return pairs

    @property
    def scores(self) -> list[float]:
        scores: list[float] = self._get("scores", list)
        if len(scores) != len(self.tokens):
            raise ModelFileError(
                f"tokenizer.ggml.scores must be as long as tokens ({len(self.tokens)}), is {len(scores)}"
            )
        return scores

    @property
    def word_rule(self) -> WordRule:
        name = self._get("pre", str)
        if name not in WORD_RULES:
            raise ModelFileError(f"tokenizer.ggml.pre must be one of {', '.join(sorted(WORD_RULES))}, is {name!r}")
        return WORD_RULES[name]

    @property
    def adds_bos(self) -> bool:
        default = True if self.kind == "llama" else self.word_rule.adds_bos
        return self.flag("add_bos_token", default)


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = vocabulary.word_rule
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges, ignore_merges=rule.ignore_merges, fuse_unk=False)
    )
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.single_digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.token_id("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_of_scores(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixes = vocabulary.flag("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefixes else []), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixes else steps)
    return tokenizer


def _merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return every way to make a token out of two, best score of the whole first, then by ids."""
    ids, scores = vocabulary.ids, vocabulary.scores
    merges = []
    for token, number in ids.items():
        if vocabulary.types[number] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[number], number, left, right))
    merges.sort()
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, _, left, right in merges]


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Tokens of type control match whole and are not shown; user-defined ones match whole and are text."""
    from tokenizers import AddedToken

    special = {CONTROL, UNKNOWN} if vocabulary.kind == "llama" else {CONTROL}
    for kinds, is_special in ((special, True), ({USER_DEFINED}, False)):
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in kinds
        ]
        if is_special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _add_post_processor(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Put the beginning-of-sequence token before, and the end token behind, where the file asks for it."""
    from tokenizers import processors

    before = vocabulary.token_id("bos") if vocabulary.adds_bos else None
    behind = vocabulary.token_id("eos") if vocabulary.flag("add_eos_token", False) else None
    if before is None and behind is None:
        return
    special = {vocabulary.tokens[number]: number for number in (before, behind) if number is not None}
    template = ["$A"]
    if before is not None:
        template.insert(0, vocabulary.tokens[before])
    if behind is not None:
        template.append(vocabulary.tokens[behind])
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(special.items()))
