"""Tokenizers and token shards: text in, the `.bin` format of llm.c out."""

import hashlib
import io
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from api.documents import ShardDocument
from api.errors import InvalidData
from api.names import END_OF_TEXT
from api.prepare_spec import TokenizerSpec
from workers.order import BLOCK_BYTES


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer learned from the train split alone; the same texts give the same tokenizer."""
    return _byte_pairs(spec.vocab_size, texts) if spec.type == "bpe" else _characters(texts)


def _byte_pairs(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2): every text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _characters(texts: Iterable[str]) -> Tokenizer:
    """One token for each character that the text has, in code point order; others are dropped when encoding."""
    alphabet = sorted(set().union(*map(set, texts)))
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=alphabet[0]))
    tokenizer.normalizer = normalizers.Replace(Regex(f"[^{_escaped(alphabet)}]"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _escaped(alphabet: list[str]) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in alphabet)


def read_tokenizer(body: bytes, sha256: str | None, key: str) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`; InvalidData if it is not what `dataset.json` says, or is none.

    `sha256` is None in a `dataset.json` of before it was recorded.
    """
    found = hashlib.sha256(body).hexdigest()
    if sha256 is not None and found != sha256:
        raise InvalidData(
            f"{key} is not what dataset.json says: sha256 {found} instead of {sha256}. "
            "The object was changed or damaged; prepare the dataset again"
        )
    try:
        return Tokenizer.from_str(body.decode())
    except Exception as error:  # the library raises nothing narrower
        raise InvalidData(f"{key} is no tokenizer ({error}); prepare the dataset again") from error


def encode(tokenizer: Tokenizer, texts: list[str], batch: int = 64) -> Iterator[NDArray[np.int64]]:
    """Return each text's tokens; with an end-of-text token after each where the vocabulary has one."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.encode_special_tokens = True  # a text that spells the end-of-text token does not become one
    for start in range(0, len(texts), batch):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + batch]):
            yield np.array([*encoding.ids, *([] if end is None else [end])], dtype=np.int64)


def shard_bytes(tokens: NDArray[np.int64], dtype: str) -> bytes:
    """Return a shard: 256 int32 (magic, version, token count, zeros), then the tokens, little-endian."""
    magic, version = (20240520, 1) if dtype == "uint16" else (20240801, 7)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    out = io.BytesIO()
    out.write(header.tobytes())
    out.write(tokens.astype("<u2" if dtype == "uint16" else "<u4").tobytes())
    return out.getvalue()


def describe_shard(name: str, body: bytes, tokens: int) -> ShardDocument:
    """Return the description of a shard, with a sha256 for each 4 MiB block."""
    blocks = [
        hashlib.sha256(body[start : start + BLOCK_BYTES]).hexdigest() for start in range(0, len(body), BLOCK_BYTES)
    ]
    return ShardDocument(name=name, size=len(body), tokens=tokens, blocks=blocks)


def unigram_loss(train: NDArray[np.int64], held_out: NDArray[np.int64], vocab_size: int) -> float:
    """Return the cross-entropy (nats/token) of `held_out` under the add-one frequencies of `train`."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    log_probability = np.log(counts / counts.sum())
    return float(-log_probability[held_out].mean())
