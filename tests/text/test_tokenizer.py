"""Tokenizers against transformers, against the definition of their algorithm, and against broken files."""

# ruff: noqa: RUF001 - the characters that look like others are meant

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ArgumentError, HeadraceError, ModelFileError, UnsupportedError
from headrace.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

NASTY = [
    "", " ", "  ", "   a", "a   ", "\n", "\r\n\r\n", "\t \t", " \n ", "a\n\n\nb", "\u00a0\u2003x", "\u200b\u200d",
    "  123", "1234567890", "٣٤٥", "½²³", "𝟘𝟙", "x1y22z", "3.14e-10", "I'm you'LL they'd 'S 's'", "don’t",
    "a" * 300, "=" * 77, "\x00\x01\x7f", "\ufeffBOM", "\ufffd", "\U0010ffff", "e\u0301é", "ﬁ Ⅷ ㎏", "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "日本語のテキスト。中文，标点！", "한국어", "עברית العربية", "हिन्दी ไทย", "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_end", "|im_end|>", "<|im_end|><|im_end|>", "<<|im_end|>>", "<|endoftext|> <repo_name>", "▁▁ ▁a",
    "def f(x):\n\treturn x**2  # ²", "https://a.b/c?d=e&f=%20#g", "A\u0300\u0301\u0302B", "\u0085\u2028\u2029", "ĠĊ",
]  # fmt: skip

whole_words = st.lists(st.sampled_from([*NASTY, "hello", " world", "  ", "12", "é", "\n"]), max_size=8).map("".join)
crowded = st.text(alphabet="ab19 \n\t'.<|>é中😀▁", max_size=40)
texts = st.one_of(st.text(max_size=40), whole_words, crowded)


@pytest.fixture(scope="session")
def published(default_model_path: Path):
    """The default model's tokenizer as transformers makes it from the same file.

    transformers leaves out how this vocabulary cuts words (it keeps GPT-2's, which merges "  " into the space before
    a digit differently), so that is set to what the model's own tokenizer.json says: each digit, then GPT-2's words.
    """
    pytest.importorskip("torch", reason="transformers reads GGUF files with torch")
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_path.parent, gguf_file=default_model_path.name)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


class TestDefaultModel:
    """The vocabulary of the default model, with nothing between."""

    @settings(max_examples=2500, deadline=None)
    @given(text=texts)
    @pytest.mark.slow
    def test_same_ids_as_transformers(self, default_tokenizer, published, text):
        assert default_tokenizer.encode(text) == published.encode(text, add_special_tokens=False)

    @pytest.mark.parametrize("text", NASTY)
    def test_same_ids_on_nasty_texts(self, default_tokenizer, published, text):
        assert default_tokenizer.encode(text) == published.encode(text, add_special_tokens=False)

    @settings(max_examples=500, deadline=None)
    @given(ids=st.lists(st.integers(0, 49151), max_size=30), skip_special=st.booleans())
    def test_same_text_as_transformers(self, default_tokenizer, published, ids, skip_special):
        expected = published.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        assert default_tokenizer.decode(ids, skip_special=skip_special) == expected

    @settings(max_examples=500, deadline=None)
    @given(text=texts)
    def test_round_trip(self, default_tokenizer, text):
        # This vocabulary has no tokens for six control characters and for bytes no assigned character uses.
        known = {default_tokenizer.token_bytes(i) for i in range(17, 300)}
        text = "".join(c for c in text if all(bytes([byte]) in known for byte in c.encode()))
        ids = default_tokenizer.encode(text, add_special=False, parse_special=False)
        assert default_tokenizer.decode(ids) == text
        assert b"".join(map(default_tokenizer.token_bytes, ids)) == text.encode()

    def test_ends(self, default_tokenizer):
        assert default_tokenizer.eos_id == 2
        assert default_tokenizer.end_ids == {0, 2}  # <|endoftext|> and <|im_end|>
        assert default_tokenizer.vocab_size == 49152


class TestByteLevel:
    """Byte-level BPE on a vocabulary of 256 bytes and nine merges."""

    def test_merges_in_order(self, byte_level_metadata):
        tokenizer = Tokenizer.from_metadata(byte_level_metadata())
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("hello whe é")]
        assert pieces == [b"hello", b" w", b"he", b" ", "é".encode()]

    @settings(max_examples=500, deadline=None)
    @given(text=texts, data=st.data())
    def test_round_trip_for_every_cut(self, byte_level_metadata, text, data):
        from headrace.text.pretokenizers import supported_names

        tokenizer = _remembered(byte_level_metadata, data.draw(st.sampled_from(supported_names())))
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text

    def test_control_tokens_are_parsed_only_on_request(self, byte_level_metadata):
        named = [("<|im_end|>", CONTROL), ("<tool>", USER_DEFINED), ("<tool>s", USER_DEFINED)]
        tokenizer = Tokenizer.from_metadata(byte_level_metadata(named))
        end, tool, tools = range(tokenizer.vocab_size - 3, tokenizer.vocab_size)
        text = "<tool>s<|im_end|><tool>"
        assert tokenizer.encode(text) == [tools, end, tool]
        spelled = tokenizer.encode(text, parse_special=False)
        assert end not in spelled and spelled[0] == tools and spelled[-1] == tool
        assert tokenizer.decode(spelled) == text
        assert tokenizer.decode([tool, end]) == "<tool>"
        assert tokenizer.decode([tool, end], skip_special=False) == "<tool><|im_end|>"

    def test_begin_and_end_ids(self, byte_level_metadata):
        named = [("<s>", CONTROL), ("</s>", CONTROL)]
        ids = {"bos_token_id": 265, "eos_token_id": 266}
        asked = Tokenizer.from_metadata(byte_level_metadata(named, **ids, add_bos_token=True, add_eos_token=True))
        assert asked.encode("hello") == [265, *asked.encode("hello", add_special=False), 266]
        assert Tokenizer.from_metadata(byte_level_metadata(named, **ids)).encode("hello") == [259]
        implied = Tokenizer.from_metadata(byte_level_metadata(named, "llama-bpe", **ids))
        assert implied.encode("hello") == [265, 259]

    def test_whole_words_first(self, byte_level_metadata):
        # No merge leads to this token: only a cut that takes whole words finds it.
        named = [("Ġxyz", NORMAL)]
        merged = Tokenizer.from_metadata(byte_level_metadata(named, "qwen2")).encode(" xyz")
        whole = Tokenizer.from_metadata(byte_level_metadata(named, "llama-bpe")).encode(" xyz")
        assert len(merged) == 4 and whole == [265]

    def test_of_equal_spellings_the_first_counts(self, byte_level_metadata):
        assert Tokenizer.from_metadata(byte_level_metadata([("hello", NORMAL)])).encode("hello") == [259]

    def test_threads_share_a_tokenizer(self, byte_level_metadata):
        tokenizer = Tokenizer.from_metadata(byte_level_metadata([("<|im_end|>", CONTROL)]))
        expected = {parse: tokenizer.encode("a<|im_end|>" * 50, parse_special=parse) for parse in (True, False)}
        wrong: list[bool] = []

        def work(parse: bool) -> None:
            results = [tokenizer.encode("a<|im_end|>" * 50, parse_special=parse) for _ in range(50)]
            wrong.extend(parse for ids in results if ids != expected[parse])

        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and expected[True] != expected[False]


def _remembered(byte_level_metadata, pre: str, _cache: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006
    if pre not in _cache:
        _cache[pre] = Tokenizer.from_metadata(byte_level_metadata([], pre, add_bos_token=False))
    return _cache[pre]


def brute_force_pieces(text: str, scores: dict[str, float]) -> list[str]:
    """The definition: of all neighbours whose union is a token, join those with the best score, the leftmost first."""
    pieces = list(text)
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not unions:
            return pieces
        place = -max(unions)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def brute_force_ids(text: str, tokens: list[str], scores: dict[str, float], with_bytes: bool) -> list[int]:
    """The ids of the pieces; what is no token is bytes, or else one unknown for each run."""
    ids: list[int] = []
    for piece in brute_force_pieces(text, scores):
        if piece in tokens:
            ids.append(tokens.index(piece))
        elif with_bytes:
            ids += [tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
        elif ids[-1:] != [0]:
            ids.append(0)
    return ids


spellings = st.text(alphabet="ab▁é", min_size=1, max_size=5)
tables = st.dictionaries(spellings, st.integers(-4, 0).map(float), max_size=25)


class TestScoreMerge:
    """SentencePiece BPE against its definition; equal scores are frequent in these vocabularies."""

    @settings(max_examples=1500, deadline=None)
    @given(
        table=tables,
        text=st.text(alphabet="ab éc", max_size=24),
        with_bytes=st.booleans(),
        prefix=st.booleans(),
    )
    @pytest.mark.slow
    def test_same_ids_as_the_definition(self, scored_metadata, table, text, with_bytes, prefix):
        metadata = scored_metadata(list(table.items()), with_bytes, add_space_prefix=prefix)
        tokens = metadata["tokenizer.ggml.tokens"]
        spelled = ("▁" if prefix and text else "") + text.replace(" ", "▁")
        expected = brute_force_ids(spelled, tokens, table, with_bytes)
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.encode(text, add_special=False) == expected
        assert tokenizer.encode(text, add_special=False) == expected  # now from the remembered words

    def test_leftmost_of_equal_scores(self, scored_metadata):
        tokenizer = Tokenizer.from_metadata(
            scored_metadata([("aa", -1), ("aaa", -1), ("a", -2)], add_space_prefix=False)
        )
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("aaaa", add_special=False)]
        assert pieces == [b"aaa", b"a"]

    @settings(max_examples=500, deadline=None)
    @given(table=tables, text=texts, prefix=st.booleans())
    def test_round_trip(self, scored_metadata, table, text, prefix):
        table = table | {"▁": -9.0}  # every vocabulary that spells spaces so has a token for one
        text = text.replace("▁", "")  # in these vocabularies this character is a space
        tokenizer = Tokenizer.from_metadata(scored_metadata(list(table.items()), add_space_prefix=prefix))
        for parse_special in (True, False):
            ids = tokenizer.encode(text, add_special=False, parse_special=parse_special)
            assert tokenizer.decode(ids, skip_special=False) == text

    def test_space_prefix_begins_a_text_and_follows_control_tokens(self, scored_metadata):
        tokenizer = Tokenizer.from_metadata(scored_metadata([("▁", -1), ("a", -2), ("▁a", 0)], with_bytes=False))
        assert tokenizer.encode("a</s>a a") == [1, 5, 2, 5, 5]
        assert tokenizer.decode([1, 5, 2, 5, 5]) == "aa a"
        assert tokenizer.encode("", add_special=False) == []

    def test_user_defined_tokens_are_never_merged(self, scored_metadata):
        tokens = [("a", -1), ("b", -2), ("ab", 0), ("aba", 0), ("bb", -9, USER_DEFINED), ("  ", -9, USER_DEFINED)]
        tokenizer = Tokenizer.from_metadata(scored_metadata(tokens, with_bytes=False, add_space_prefix=False))
        pieces = [
            tokenizer.token_bytes(i) for i in tokenizer.encode("abba  ab", add_special=False, parse_special=False)
        ]
        assert pieces == [b"a", b"bb", b"a", b"  ", b"ab"]

    def test_unused_tokens_are_passed_through(self, scored_metadata):
        tokens = [("a", -1), ("b", -2), ("ab", 0, UNUSED), ("abb", 0)]
        tokenizer = Tokenizer.from_metadata(scored_metadata(tokens, with_bytes=False, add_space_prefix=False))
        encoded = [tokenizer.encode(text, add_special=False) for text in ("ab", "abb")]
        assert encoded == [[3, 4], [6]]

    def test_text_never_merges_into_a_control_token(self, scored_metadata):
        tokens = [("<", -1), ("/", -1), ("s", -1), (">", -1), ("</", 0), ("s>", 0)]
        tokenizer = Tokenizer.from_metadata(scored_metadata(tokens, add_space_prefix=False))
        assert tokenizer.encode("</s>", add_special=False) == [2]
        assert 2 not in tokenizer.encode("</s>", add_special=False, parse_special=False)

    def test_a_long_text_without_spaces(self, scored_metadata):
        tokens = [("a", -9.0)] + [("a" * 2**n, -float(n)) for n in range(1, 5)]
        tokenizer = Tokenizer.from_metadata(scored_metadata(tokens, add_space_prefix=False))
        last = tokenizer.vocab_size - 1
        assert tokenizer.encode("a" * 160_000, add_special=False) == [last] * 10_000


def _without(metadata, key):
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


class TestBadFiles:
    """A file's metadata is not trusted: whatever it says ends in a tokenizer or in one clear error."""

    @pytest.mark.parametrize("key", ["tokens", "merges"])
    def test_missing_array(self, byte_level_metadata, key):
        with pytest.raises(ModelFileError, match=f"tokenizer.ggml.{key}"):
            Tokenizer.from_metadata(_without(byte_level_metadata(), key))

    def test_missing_scores(self, scored_metadata):
        with pytest.raises(ModelFileError, match="scores"):
            Tokenizer.from_metadata(_without(scored_metadata([("a", 0)]), "scores"))

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"tokens": []}, "tokens"),
            ({"tokens": ["a", 1]}, "tokens"),
            ({"merges": ["ab"]}, "merges"),
            ({"merges": ["a b c"]}, "merges"),
            ({"merges": ["h nothere"]}, "merges"),
            ({"merges": ["h i"]}, "merges"),  # both pieces are tokens, their union is not
            ({"token_type": np.array([1, 2])}, "token_type"),
            ({"eos_token_id": 10**9}, "eos_token_id"),
            ({"bos_token_id": -1}, "bos_token_id"),
            ({"bos_token_id": "first"}, "bos_token_id"),
            ({"add_bos_token": 3}, "add_bos_token"),
        ],
    )
    def test_contradictions(self, byte_level_metadata, fields, named):
        with pytest.raises(ModelFileError, match=named):
            Tokenizer.from_metadata(byte_level_metadata(**fields))

    def test_scores_that_are_no_numbers(self, scored_metadata):
        metadata = scored_metadata([("a", float("nan"))])
        with pytest.raises(ModelFileError, match="scores"):
            Tokenizer.from_metadata(metadata)

    def test_byte_tokens_that_are_no_bytes(self, scored_metadata):
        with pytest.raises(ModelFileError, match="<0xNN>"):
            Tokenizer.from_metadata(scored_metadata([("<0xZZ>", 0, BYTE)]))

    def test_unknown_kinds_are_named(self, byte_level_metadata):
        with pytest.raises(UnsupportedError, match=r"'new-cut'(.|\n)*smollm"):
            Tokenizer.from_metadata(byte_level_metadata(pre="new-cut"))
        with pytest.raises(UnsupportedError, match="'bert'"):
            Tokenizer.from_metadata(byte_level_metadata(model="bert"))

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_any_damage_is_one_clear_error(self, byte_level_metadata, scored_metadata, data):
        whole = data.draw(st.sampled_from([byte_level_metadata(), scored_metadata([("a", 0), ("▁a", 0)])]))
        damaged = dict(whole)
        junk = st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.text(max_size=4)),
            st.lists(st.integers(-9, 9)).map(np.array), st.lists(st.floats()),
        )  # fmt: skip
        for key in data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=3)):
            damaged[key] = data.draw(junk)
        try:
            tokenizer = Tokenizer.from_metadata(damaged)
            tokenizer.decode(tokenizer.encode("a hello <s>"))
        except HeadraceError as error:
            assert str(error)

    @pytest.mark.parametrize("text", ["\ud800", "a\udfffb", b"bytes", None, 3])
    def test_what_is_no_text(self, byte_level_metadata, text):
        with pytest.raises(ArgumentError, match="text"):
            Tokenizer.from_metadata(byte_level_metadata()).encode(text)

    @pytest.mark.parametrize("token_id", [-1, 265, 10**12])
    def test_ids_outside_the_vocabulary(self, byte_level_metadata, token_id):
        with pytest.raises(ArgumentError, match="0 to 264"):
            Tokenizer.from_metadata(byte_level_metadata()).decode([0, token_id])
