"""Tokenizers lose nothing that they promise to keep, shards are llm.c's, and the unigram loss is a closed form."""

import hashlib
import math
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from api.documents import ShardDocument
from api.errors import InvalidData
from api.names import END_OF_TEXT
from api.prepare_spec import TokenizerSpec
from workers.blocks import Shard, check_header
from workers.order import BLOCK_BYTES, HEADER_BYTES
from workers.tokens import describe_shard, encode, shard_bytes, train_tokenizer, unigram_loss

BPE = TokenizerSpec(type="bpe", vocab_size=300)
CHARACTERS = TokenizerSpec(type="characters")
TEXTS = ["the cat sat on the mat\n", "def the(cat):\n\treturn 'mat'\n", "naïve – 猫 🐈"] * 3
#: Trained once: examples of a property must not each train their own.
BYTE_PAIRS = train_tokenizer(BPE, TEXTS)

texts = st.text(max_size=60)


def decode(tokenizer: Tokenizer, ids: NDArray[np.int64]) -> str:
    return tokenizer.decode(ids.tolist())


def encode_one(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    (tokens,) = encode(tokenizer, [text])
    return tokens


@given(texts)
@example("")
@example("  leading, trailing and  double spaces \n\n\t")
@example("\x00\x1f\x7f\u200b\ufeff\ufffd")
@example("e\u0301 is not \u00e9; ﬁ is not fi")
def test_byte_pairs_give_back_any_text(text: str) -> None:
    assert decode(BYTE_PAIRS, encode_one(BYTE_PAIRS, text)) == text


@given(st.text(min_size=1, max_size=60))
@example("]^-\\[a-z]")
@example("a\nb\r\nc\x00\u0301\U0010ffff")
def test_characters_give_back_any_text_of_their_alphabet(text: str) -> None:
    tokenizer = train_tokenizer(CHARACTERS, [text])
    tokens = encode_one(tokenizer, text)
    assert len(tokens) == len(text)
    assert decode(tokenizer, tokens) == text


@given(st.text(min_size=1, max_size=30), texts)
def test_characters_that_the_train_split_never_had_are_dropped(known: str, text: str) -> None:
    tokenizer = train_tokenizer(CHARACTERS, [known])
    assert decode(tokenizer, encode_one(tokenizer, text)) == "".join(c for c in text if c in known)


def test_characters_are_numbered_in_code_point_order() -> None:
    tokenizer = train_tokenizer(CHARACTERS, ["banana", "é\n"])
    assert tokenizer.get_vocab() == {"\n": 0, "a": 1, "b": 2, "n": 3, "é": 4}


@pytest.mark.parametrize("spec", [BPE, CHARACTERS])
def test_the_same_texts_give_the_same_tokenizer(spec: TokenizerSpec) -> None:
    assert len({train_tokenizer(spec, iter(TEXTS)).to_str() for _ in range(5)}) == 1


@pytest.mark.parametrize("spec", [BPE, CHARACTERS])
def test_a_tokenizer_survives_its_own_file(spec: TokenizerSpec) -> None:
    tokenizer = train_tokenizer(spec, TEXTS)
    again = Tokenizer.from_str(tokenizer.to_str())
    for text in TEXTS:
        assert encode_one(again, text).tolist() == encode_one(tokenizer, text).tolist()
        assert decode(again, encode_one(tokenizer, text)) == text


def test_byte_pairs_learn_to_merge_and_end_each_document() -> None:
    assert BYTE_PAIRS.get_vocab_size() <= 300
    end = BYTE_PAIRS.token_to_id(END_OF_TEXT)
    first, second = encode(BYTE_PAIRS, ["the the the", ""])
    assert len(first) < len("the the the")
    assert first[-1] == end
    assert second.tolist() == [end]


def test_characters_have_no_token_beside_those_of_the_text() -> None:
    tokenizer = train_tokenizer(CHARACTERS, ["abc"])
    assert [tokens.tolist() for tokens in encode(tokenizer, ["ab", "", "cc"])] == [[0, 1], [], [2, 2]]


def test_documents_keep_their_order_whatever_the_batch() -> None:
    tokenizer = train_tokenizer(CHARACTERS, ["abc"])
    for batch in (1, 2, 64):
        encoded = encode(tokenizer, ["a", "b", "c", "ab", "bc"], batch)
        assert [tokens.tolist() for tokens in encoded] == [[0], [1], [2], [0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("dtype", "magic", "version", "code"), [("uint16", 20240520, 1, "H"), ("uint32", 20240801, 7, "I")]
)
def test_a_shard_is_llm_c_to_the_byte(dtype: str, magic: int, version: int, code: str) -> None:
    largest = 2**16 - 1 if dtype == "uint16" else 2**31 - 1
    body = shard_bytes(np.array([0, 1, 258, largest]), dtype)
    header = struct.pack("<256i", magic, version, 4, *[0] * 253)
    assert len(header) == HEADER_BYTES
    assert body == header + struct.pack(f"<4{code}", 0, 1, 258, largest)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_readers_check_accepts_the_header_and_refuses_any_other(dtype: str) -> None:
    body = shard_bytes(np.arange(10), dtype)
    document = describe_shard("shard-00000.bin", body, 10)
    itemtype = np.dtype("<u2") if dtype == "uint16" else np.dtype("<u4")
    check_header(Shard("some/key", document, itemtype), body)
    wrong_type = np.dtype("<u4") if dtype == "uint16" else np.dtype("<u2")
    wrong_count = document.model_copy(update={"tokens": 11})
    for shard in (Shard("some/key", document, wrong_type), Shard("some/key", wrong_count, itemtype)):
        with pytest.raises(InvalidData, match=r"some/key has a header of 10 tokens of uint"):
            check_header(shard, body)
    with pytest.raises(InvalidData, match="some/key is no token shard: its header begins with magic 1, version 1"):
        check_header(Shard("some/key", document, itemtype), b"\1\0\0\0" * 256)


def test_a_shard_is_described_by_a_hash_of_each_block_of_the_file() -> None:
    body = shard_bytes(np.arange(5 * 2**20) % 1000, "uint16")
    described = describe_shard("shard-00000.bin", body, 5 * 2**20)
    blocks = [body[start : start + BLOCK_BYTES] for start in range(0, len(body), BLOCK_BYTES)]
    assert [len(block) for block in blocks] == [BLOCK_BYTES, BLOCK_BYTES, len(body) - 2 * BLOCK_BYTES]
    assert described == ShardDocument(
        name="shard-00000.bin",
        size=len(body),
        tokens=5 * 2**20,
        blocks=[hashlib.sha256(block).hexdigest() for block in blocks],
    )


def test_unigram_loss_is_the_cross_entropy_under_add_one_frequencies() -> None:
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_loss(train, held_out, 3) == pytest.approx(expected)


def test_unigram_loss_of_even_frequencies_is_log_of_the_vocabulary() -> None:
    even = np.tile(np.arange(50), 3)
    assert unigram_loss(even, even, 50) == pytest.approx(math.log(50))


def test_a_text_that_spells_the_end_of_text_token_does_not_become_one() -> None:
    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=300), ["some text", "more text"])
    (tokens,) = encode(tokenizer, [f"a{END_OF_TEXT}b"])
    assert list(tokens).count(tokenizer.token_to_id(END_OF_TEXT)) == 1
    assert tokens[-1] == tokenizer.token_to_id(END_OF_TEXT)
