"""Checkpoints as files: what transformers, tokenizers and safetensors make of them, and that no damage passes."""

import asyncio
import hashlib
import itertools
import json
import logging
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_model
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect
from tokenizers import Tokenizer
from torch import Tensor, nn

from api.documents import CheckpointRef, Manifest, SegmentDocument, now
from api.errors import Conflict, InvalidData, NotFound, ObjectMissing, Unauthorized
from api.jobs import ModelFile
from api.layout import DatasetLayout, JobLayout
from api.prepare_spec import TokenizerSpec
from api.spec import ModelSpec
from service import download, export
from service.architectures import export_config, export_tensors, model_tensors
from service.download import Download
from service.export import File, find_checkpoint, held, open_file
from service.rows import JobRow
from service.store import Store
from tests.checkpoints import write_checkpoint
from tests.fakes import ACCEPTED, T0, MemoryBucket, dataset, job_id, new_store, row, train_spec
from tests.unit.service.in_process import Service, problem
from workers.model import Transformer
from workers.optim import make_optimizer
from workers.snapshot import state_of
from workers.tokens import train_tokenizer

TEXTS = ["def f(x):\n    return x  # Grüße, 世界\n" * 4, "class A:\n\tpass\n"]
LENGTH, STEP, SEGMENT = 24, 8, "1-0-a"
AT = CheckpointRef(segment=SEGMENT, step=STEP)
LAYOUT = JobLayout("default", job_id(1))
TINY: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4}
LAYOUTS = [
    {"positions": positions, "norm": norm, "activation": activation, "kv_heads": heads, "bias": bias, "tied": tied}
    for positions, norm, activation in itertools.product(("rotary", "learned"), ("rms", "layer"), ("swiglu", "gelu"))
    for heads, bias, tied in ((4, False, True), (2, True, False), (4, True, True))
]


def model_spec(tied: bool = True, **fields: Any) -> ModelSpec:
    return ModelSpec(**{**TINY, "tied_embeddings": tied, **fields})


def named(layout: dict[str, Any]) -> str:
    return "-".join(str(value) for value in layout.values())


class Checkpointed:
    """A job with one checkpoint of a model, written by the workers' own code, in as many parts as there are ranks."""

    def __init__(self, world_size: int = 3, tokenizer: str = "bpe", **model: Any) -> None:
        self.bucket, self.model_spec = MemoryBucket(), model_spec(**model)
        size = {"vocab_size": 300} if tokenizer == "bpe" else {}
        self.tokenizer = train_tokenizer(TokenizerSpec.model_validate({"type": tokenizer, **size}), TEXTS)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.model = filled(Transformer(self.model_spec, self.vocab_size, LENGTH))
        self.spec = train_spec(model=self.model_spec.model_dump(), data={"dataset": "words", "sequence_length": LENGTH})
        self.job: JobRow = row(1, self.spec)
        self._write_dataset()
        self._write_checkpoint(world_size)

    def _write_dataset(self) -> None:
        layout, body = DatasetLayout("default", "words", "v1"), self.tokenizer.to_str().encode()
        digest = hashlib.sha256(body).hexdigest()
        self.bucket.put(layout.tokenizer, body)
        self.bucket.put_document(layout.document, dataset().model_copy(update={"tokenizer_sha256": digest}))

    def _write_checkpoint(self, world_size: int) -> None:
        document = SegmentDocument(
            job_id=self.job.id, segment=SEGMENT, origin=None, world_size=world_size, fingerprint=None, created_at=T0
        )
        self.bucket.put_document(LAYOUT.segment(SEGMENT).document, document)
        state = {**state_of(self.model, self._optimizer()), "loop.loss_sum": torch.zeros(1, dtype=torch.float64)}
        write_checkpoint(self.bucket, LAYOUT, AT, state, world_size)

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = make_optimizer(self.model, self.spec.optimizer)
        tokens_BT = torch.randint(self.vocab_size, (2, LENGTH))
        self.model(tokens_BT, tokens_BT).backward()
        optimizer.step()
        return optimizer

    def open(self, name: ModelFile) -> File:
        return open_file(self.bucket, self.job, AT, name)

    def file(self, name: ModelFile) -> bytes:
        opened = self.open(name)
        body = b"".join(opened.pieces)
        assert len(body) == opened.size
        return body

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file("config.json"))
        return found

    def folder(self, folder: Path) -> Path:
        """Download everything."""
        names: list[ModelFile] = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        for name in names:
            (folder / name).write_bytes(self.file(name))
        return folder

    @property
    def manifest_key(self) -> str:
        return LAYOUT.segment(SEGMENT).checkpoint(STEP).manifest

    @property
    def parts(self) -> list[str]:
        return sorted(key for key in self.bucket.content if key.endswith(".safetensors"))

    def part_with(self, name: str) -> str:
        return next(key for key in self.parts if f'"{name}"'.encode() in self.bucket.content[key])

    def logits(self, tokens_BT: Tensor) -> Tensor:
        with torch.no_grad():
            logits_BTV: Tensor = self.model.eval()(tokens_BT)
        return logits_BTV


def filled(model: Transformer) -> Transformer:
    """Give every parameter values that matter: fresh biases and norms would not show in the logits."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)
    return model


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)  # these tensors are too small to share out
    torch.manual_seed(11)


@pytest.fixture(scope="module")
def llama() -> Checkpointed:
    """Shared by tests that do not change it."""
    return Checkpointed(kv_heads=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_the_control_plane_knows_every_parameter_and_its_shape(layout: dict[str, Any]) -> None:
    spec = model_spec(**layout)
    parameters = Transformer(spec, 61, LENGTH).named_parameters()
    assert model_tensors(spec, 61, LENGTH) == {name: tuple(p.shape) for name, p in parameters}


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that transformers imports
def test_every_layout_loads_elsewhere_with_the_same_logits(layout: dict[str, Any], tmp_path: Path) -> None:
    made = Checkpointed(**layout)
    folder = made.folder(tmp_path)
    tokens_BT = torch.randint(made.vocab_size, (3, LENGTH))
    loaded: nn.Module
    if made.config()["model_type"] == "lockstep":
        config = made.config()
        loaded = Transformer(ModelSpec(**config["model"]), config["vocab_size"], config["sequence_length"])
        load_model(loaded, folder / "model.safetensors")
        with torch.no_grad():
            theirs_BTV = loaded.eval()(tokens_BT)
    else:
        from transformers import AutoModelForCausalLM

        answer: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        loaded, told = answer
        assert not any(told.values()), told
        with torch.no_grad():
            theirs_BTV = loaded.eval()(tokens_BT).logits
    ours_BTV = made.logits(tokens_BT)
    assert ours_BTV.abs().max() > 1
    torch.testing.assert_close(theirs_BTV, ours_BTV, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "model_type"),
    [
        ({}, "llama"),
        ({"norm": "layer", "activation": "gelu"}, "starcoder2"),
        ({"positions": "learned", "norm": "layer", "activation": "gelu"}, "opt"),
        ({"positions": "learned", "norm": "layer", "activation": "gelu", "kv_heads": 2}, "lockstep"),
        ({"norm": "layer"}, "lockstep"),
        ({"activation": "gelu"}, "lockstep"),
    ],
)
def test_a_layout_is_the_architecture_that_it_equals(layout: dict[str, Any], model_type: str) -> None:
    assert export_config(model_spec(**layout), 61, LENGTH, None)["model_type"] == model_type


@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
@pytest.mark.parametrize("layout", [{}, {"norm": "layer", "activation": "gelu"}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tokenizer_loads_elsewhere_and_gives_the_same_tokens(
    tokenizer: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = Checkpointed(tokenizer=tokenizer, **layout)
    folder = made.folder(tmp_path)
    expected = made.tokenizer.encode(TEXTS[0]).ids
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXTS[0]).ids == expected
    for theirs in (
        AutoTokenizer.from_pretrained(folder),
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),  # type: ignore[no-untyped-call]
    ):
        assert theirs(TEXTS[0])["input_ids"] == expected
        assert theirs.decode(expected) == TEXTS[0]
    end = made.tokenizer.token_to_id("<|endoftext|>")
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == end
    assert made.config()["eos_token_id"] == end
    assert (end is None) == (tokenizer == "characters")


def test_the_file_is_what_the_safetensors_library_takes(llama: Checkpointed, tmp_path: Path) -> None:
    body = llama.file("model.safetensors")
    assert (8 + int.from_bytes(body[:8], "little")) % 8 == 0
    (tmp_path / "m.safetensors").write_bytes(body)
    with safe_open(tmp_path / "m.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {t.name for t in export_tensors(llama.model_spec, llama.vocab_size, LENGTH)}
        assert not [name for name in opened.keys() if "optimizer" in name or "loop" in name]  # noqa: SIM118


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(piece=st.integers(64, 3000))
def test_the_bytes_do_not_depend_on_the_pieces_and_no_piece_is_larger(
    llama: Checkpointed, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    whole = llama.file("model.safetensors")
    asked = []
    get_range = MemoryBucket.get_range

    def counted(self: MemoryBucket, key: str, start: int, length: int) -> bytes:
        asked.append(length)
        return get_range(self, key, start, length)

    with monkeypatch.context() as patch:
        patch.setattr(export, "PIECE", piece)
        opened = llama.open("model.safetensors")
        patch.setattr(MemoryBucket, "get_range", counted)
        header, *pieces = opened.pieces
    assert header + b"".join(pieces) == whole
    assert max(map(len, pieces)) == max(asked) <= piece


@settings(max_examples=150, deadline=None)
@given(part=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_in_a_part_passes_as_a_whole_file(
    llama: Checkpointed, part: int, place: float, bit: int
) -> None:
    """It breaks off before its length is reached, unless the bit is one that the model does not have."""
    whole, key = llama.file("model.safetensors"), llama.parts[part]
    sound = llama.bucket.content[key]
    index = int(place * len(sound))
    llama.bucket.content[key] = sound[:index] + bytes([sound[index] ^ (1 << bit)]) + sound[index + 1 :]
    try:
        sent = bytearray()
        opened = llama.open("model.safetensors")
        for piece in opened.pieces:
            sent += piece
        assert sent == whole
    except InvalidData:
        assert len(sent) < len(whole)
    finally:
        llama.bucket.content[key] = sound


def test_a_damaged_tensor_keeps_back_its_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Checkpointed(world_size=1)
    monkeypatch.setattr(export, "PIECE", 1000)
    (key,) = made.parts
    weights = made.model.embedding.weight.detach().numpy().tobytes()
    body = made.bucket.content[key]
    start = body.index(weights)
    made.bucket.content[key] = body[:start] + bytes([body[start] ^ 1]) + body[start + 1 :]
    opened = made.open("model.safetensors")
    sent = [len(next(opened.pieces)) for _ in range(len(weights) // 1000 + 1)]
    with pytest.raises(InvalidData, match=r"not what they were"):
        next(opened.pieces)
    assert sum(sent[1:]) == len(weights) - (len(weights) % 1000 or 1000)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda h: h["model.norm.weight"].update(dtype="I32"), "holds model.norm.weight as I32"),
        (lambda h: h["model.norm.weight"].update(shape=[4, 8]), "norm.weight is missing or of another shape"),
        (lambda h: h["model.blocks.0.ffn.up.weight"].update(shape=[32, 88]), "ffn.up.weight is missing or of another"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 64]), "norm.weight is missing or of another shape"),
        (lambda h: h["model.embedding.weight"].update(shape=[299, 32]), "embedding.weight is missing or of another"),
        (lambda h: h.pop("model.norm.weight"), "norm.weight is missing"),
        (lambda h: h.pop("model.embedding.weight"), "embedding.weight is missing"),
        (lambda h: h["model.norm.weight"].update(shape="none"), "a header that is not one of safetensors"),
        (lambda h: h["model.norm.weight"].pop("data_offsets"), "a header that is not one of safetensors"),
    ],
)
def test_a_header_that_lies_is_found_before_anything_is_sent(file: ModelFile, lie: Any, words: str) -> None:
    made = Checkpointed(world_size=1)
    (key,) = made.parts
    body = made.bucket.content[key]
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    lie(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    made.bucket.content[key] = len(text).to_bytes(8, "little") + text + body[8 + length :]
    with pytest.raises(InvalidData, match=words):
        made.open(file)


@pytest.mark.parametrize(
    ("start", "words"),
    [(b"\xff" * 8, "does not begin with a header"), ((2).to_bytes(8, "little") + b"[]", "not one of safetensors")],
)
def test_a_part_that_is_no_safetensors_file_is_refused(start: bytes, words: str) -> None:
    made = Checkpointed(world_size=1)
    (key,) = made.parts
    made.bucket.content[key] = start + made.bucket.content[key][len(start) :]
    with pytest.raises(InvalidData, match=words):
        made.open("model.safetensors")


def test_a_tensor_under_the_name_of_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Checkpointed(world_size=1)
    (key,) = made.parts
    one, other = b'"model.blocks.0.attention.key.weight"', b'"model.blocks.1.attention.key.weight"'
    body = made.bucket.content[key]
    made.bucket.content[key] = body.replace(one, b"!").replace(other, one).replace(b"!", other)
    with pytest.raises(InvalidData):
        b"".join(made.open("model.safetensors").pieces)


def test_a_part_that_is_cut_short_or_gone_is_no_whole_file() -> None:
    made = Checkpointed()
    key = made.part_with("model.norm.weight")
    body = made.bucket.content[key]
    made.bucket.content[key] = body[: 8 + int.from_bytes(body[:8], "little") + 100]
    with pytest.raises(InvalidData):
        b"".join(made.open("model.safetensors").pieces)
    del made.bucket.content[key]
    with pytest.raises(ObjectMissing):
        made.open("model.safetensors")


def test_only_a_complete_checkpoint_is_handed_out() -> None:
    made = Checkpointed()
    del made.bucket.content[made.manifest_key]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        with pytest.raises(NotFound, match="has no checkpoint at step 8"):
            made.open(name)


def test_a_manifest_whose_seal_does_not_fit_is_damage() -> None:
    """Be it in a hash: what would be compared with it is not what was written."""
    made = Checkpointed()
    stored = made.bucket.content[made.manifest_key]
    made.bucket.content[made.manifest_key] = stored.replace(b'"world_size":3', b'"world_size":7')
    with pytest.raises(InvalidData, match="its seal does not fit"):
        made.open("model.safetensors")


def test_a_tensor_whose_name_was_damaged_is_damage_and_no_old_checkpoint() -> None:
    made = Checkpointed(world_size=1)
    [part] = made.parts
    sound = made.bucket.content[part]
    made.bucket.content[part] = sound.replace(b"model.norm", b"model.nors", 1)
    assert made.bucket.content[part] != sound
    with pytest.raises(InvalidData, match="of which its receipt says nothing"):
        made.file("model.safetensors")


def test_a_checkpoint_without_hashes_of_tensors_is_refused_in_words() -> None:
    made = Checkpointed()
    manifest = made.bucket.get_document(made.manifest_key, Manifest)
    old = [part.model_copy(update={"tensors": {}}) for part in manifest.parts]
    made.bucket.put_document(made.manifest_key, manifest.model_copy(update={"parts": old}))
    with pytest.raises(Conflict, match="cannot be verified"):
        made.open("model.safetensors")


def test_bare_shards_have_no_tokenizer_but_a_model(tmp_path: Path) -> None:
    made = Checkpointed()
    made.job = row(1, made.spec, dataset_version="bare-0123456789ab")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with pytest.raises(NotFound, match="token shards and has no tokenizer"):
            made.open(name)
    assert made.config()["eos_token_id"] is None
    assert len(made.file("model.safetensors")) > 1000


def test_a_tokenizer_that_was_changed_is_not_handed_out() -> None:
    made = Checkpointed()
    key = DatasetLayout("default", "words", "v1").tokenizer
    made.bucket.content[key] = made.bucket.content[key].replace(b"<|endoftext|>", b"<|endoftExt|>")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        with pytest.raises(InvalidData, match=r"not what dataset\.json says"):
            made.open(name)


def test_only_steps_of_the_history_are_found(llama: Checkpointed) -> None:
    def found(end: CheckpointRef | None, step: int) -> CheckpointRef | None:
        job = row(1, llama.spec, history_end=end.model_dump() if end else None)
        return find_checkpoint(llama.bucket, job, step)

    assert found(None, STEP) == AT
    assert found(AT, STEP) == AT
    assert found(CheckpointRef(segment=SEGMENT, step=7), STEP) is None
    assert found(None, 0) is None


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = new_store(tmp_path)
    made.insert(row(1), ACCEPTED, None)
    yield made
    made._engine.dispose()


def pinned(store: Store, at: datetime) -> bool:
    return store.pinned(job_id(1), at) == {AT}


def test_a_pin_is_held_while_pieces_are_sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [T0]
    monkeypatch.setattr(export, "now", lambda: clock[0])
    pin = store.pin(job_id(1), AT, "download", T0, T0 + export.PIN)
    assert pin is not None
    pieces = held((bytes([n]) for n in range(9)), store, pin, "a file")
    for n in range(9):
        assert next(pieces) == bytes([n])
        assert pinned(store, clock[0])
        clock[0] += timedelta(minutes=6)  # nine of them are far longer than a pin


@pytest.mark.parametrize("ends", ["sent", "broken", "client gone in the middle", "client gone before the first piece"])
def test_a_pin_is_let_go_of_however_the_sending_ends(store: Store, caplog: pytest.LogCaptureFixture, ends: str) -> None:
    def some() -> Any:
        yield b"a"
        if ends == "broken":
            raise InvalidData("damaged")
        yield b"b"

    pin = store.pin(job_id(1), AT, "download", now(), now() + export.PIN)
    assert pin is not None
    pieces = held(some(), store, pin, "job x: model.safetensors of step 8")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        if ends == "client gone before the first piece" or (ends == "client gone in the middle" and sent):
            raise OSError  # as the server says it
        sent.append(message)
        assert pinned(store, now())

    async def receive() -> Any:
        raise AssertionError("not looked at")

    answer = Download(File(2, pieces, lambda: store.unpin(pin)), "model.safetensors", lambda: None)
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with caplog.at_level(logging.ERROR), suppress(ClientDisconnect):
        asyncio.run(answer(scope, receive, send))
    assert not pinned(store, now())
    assert caplog.messages == ["job x: model.safetensors of step 8 breaks off: damaged"] * (ends == "broken")


@pytest.mark.parametrize(("fails", "ended"), [(Unauthorized("revoked"), True), (SQLAlchemyError("away"), False)])
def test_a_long_answer_does_not_outlast_its_key_and_goes_on_without_the_database(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: Exception, ended: bool
) -> None:
    monkeypatch.setattr(download, "_CHECKED_EVERY", 0.0)
    checks: list[Exception | None] = [None, fails, None]
    sent: list[bytes] = []
    released = []

    def check() -> None:
        if (error := checks.pop(0)) is not None:
            raise error

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        raise AssertionError("not looked at")

    pieces = (bytes([n]) for n in b"abc")
    answer = Download(File(3, pieces, lambda: released.append(True)), "model.safetensors", check)
    with caplog.at_level(logging.INFO):
        asyncio.run(answer({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
    assert b"".join(sent) == (b"a" if ended else b"abc")
    assert caplog.messages == ["an answer was ended: revoked"] * ended
    assert released == [True]


def test_a_download_too_many_of_a_project_is_refused_and_keeps_nothing(service: Service) -> None:
    made = Checkpointed()
    service.bucket.content.update(made.bucket.content)
    service.store.insert(made.job, ACCEPTED, None)
    service.app.state.long_answers = download.places(1)
    path = f"/v1/jobs/{made.job.id}/checkpoints/{STEP}/files/config.json"
    with service.app.state.long_answers.one("default"):
        problem(service.client.get(path), 429, "rate-limited")
        assert not pinned(service.store, now())
    assert service.client.get(path).json() == made.config()
