"""How text is split: whole documents that never move, or the tail; never a split without text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import InvalidData
from api.prepare_spec import PrepareSpec
from workers.corpus import TextDocument, split


def spec(**changes: Any) -> PrepareSpec:
    source = {"type": "text", "folder": "texts"}
    return PrepareSpec(**{"kind": "prepare", "name": "p", "dataset": "d", "source": source, **changes})


def documents(count: int, start: int = 0) -> list[TextDocument]:
    return [TextDocument(f"file-{i}.txt", f"text {i}\n") for i in range(start, start + count)]


def names(part: list[TextDocument]) -> set[str]:
    return {document.name for document in part}


@given(st.integers(0, 200), st.floats(0.05, 0.95))
def test_a_document_never_moves_when_others_are_added(more: int, fraction: float) -> None:
    by_document = spec(split="document", eval_fraction=fraction)
    before, after = split(documents(200), by_document), split(documents(200 + more), by_document)
    assert names(before["train"]) <= names(after["train"])
    assert names(before["eval"]) <= names(after["eval"])


def test_each_document_is_whole_in_one_split_in_the_order_given() -> None:
    parts = split(documents(300), spec(split="document"))
    assert names(parts["train"]).isdisjoint(names(parts["eval"]))
    assert sorted(parts["train"] + parts["eval"], key=documents(300).index) == documents(300)
    assert all(part == sorted(part, key=documents(300).index) for part in parts.values())


def test_about_the_wanted_fraction_of_documents_is_held_out() -> None:
    parts = split(documents(5000), spec(split="document", eval_fraction=0.2))
    assert len(parts["eval"]) == pytest.approx(1000, rel=0.1)


def test_which_documents_are_held_out_depends_on_their_names_alone() -> None:
    one = split(documents(100), spec(split="document"))
    other = split([TextDocument(d.name, "other text") for d in reversed(documents(100))], spec(split="document"))
    assert names(one["eval"]) == names(other["eval"])


def test_a_larger_fraction_holds_out_all_that_a_smaller_one_did() -> None:
    small, large = (split(documents(300), spec(eval_fraction=fraction)) for fraction in (0.1, 0.3))
    assert names(small["eval"]) < names(large["eval"])


def test_the_tail_is_the_last_part_of_the_whole_text() -> None:
    parts = split([TextDocument("a", "0123"), TextDocument("b", "456789")], spec(split="tail", eval_fraction=0.3))
    assert "".join(d.text for d in parts["train"]) == "0123456"
    assert "".join(d.text for d in parts["eval"]) == "789"


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.floats(0.05, 0.95))
def test_a_tail_split_loses_no_character_or_is_refused(texts: list[str], fraction: float) -> None:
    given_documents = [TextDocument(str(i), text) for i, text in enumerate(texts)]
    try:
        parts = split(given_documents, spec(split="tail", eval_fraction=fraction))
    except InvalidData:
        assert len("".join(texts)) < 20
        return
    assert "".join(d.text for part in parts.values() for d in part) == "".join(texts)
    assert all(any(d.text for d in part) for part in parts.values())


@pytest.mark.parametrize("how", ["document", "tail"])
@pytest.mark.parametrize("texts", [[""], ["", ""], ["x"]])
def test_a_split_that_would_be_empty_is_refused_with_what_to_do(how: str, texts: list[str]) -> None:
    few = [TextDocument(str(i), text) for i, text in enumerate(texts)]
    with pytest.raises(InvalidData, match=r"leaves a split empty; use `split: tail`, or more documents"):
        split(few, spec(split=how))
