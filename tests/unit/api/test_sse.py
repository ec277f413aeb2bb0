"""Server-sent events: whatever the pieces in which the bytes come, the messages are those of the whole."""

import itertools

from fastapi.sse import format_sse_event
from hypothesis import given
from hypothesis import strategies as st

from api.sse import Message, Parser


def messages_of(text: bytes, cuts: list[int]) -> list[Message]:
    parser, places = Parser(), sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    return [message for piece in (b"", *pieces) for message in parser.feed(piece)]


def reference(text: bytes) -> list[Message]:
    """The rules of the HTML standard, word by word, on the whole text at once."""
    found: list[Message] = []
    data, event, last = "", "", None
    lines = text.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for line in lines[:-1]:
        name, value = ([*line.split(":", 1), ""])[:2]
        value = value[1:] if value.startswith(" ") else value
        if line == "":
            if data:
                found.append(Message(event or "message", data[:-1], last))
            data = event = ""
        elif name == "data":
            data += value + "\n"
        elif name == "event":
            event = value
        elif name == "id" and "\0" not in value:
            last = value
    return found


CUTS = st.lists(st.integers(0, 10**6), max_size=12)
PARTS = st.sampled_from(
    ["data", "id", "event", "retry", ":", ": ", " ", "\r", "\n", "\r\n", "\n\n", "x", "7", "é", "語", "\0", "\u2028"]
)


@given(st.lists(PARTS, max_size=60), CUTS)
def test_any_text_cut_anywhere_is_read_as_the_standard_says(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts).encode()
    assert messages_of(text, cuts) == reference(text)


@given(st.binary(max_size=80), CUTS)
def test_bytes_that_are_no_text_end_nothing(text: bytes, cuts: list[int]) -> None:
    assert messages_of(text, cuts) == messages_of(text, [])


LINE = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=20)


@given(
    st.lists(st.tuples(st.lists(LINE, min_size=1, max_size=3).map("\n".join), LINE, LINE.filter(bool)), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    CUTS,
)
def test_what_a_server_writes_is_read_back(sent: list[tuple[str, str, str]], end: str, cuts: list[int]) -> None:
    pieces = [b": a comment\n\nretry: 5\n\n"]
    for data, id, event in sent:
        pieces.append(format_sse_event(data_str=data, id=id, event=event, comment="ping"))
    text = b"".join(pieces).decode().replace("\n", end).encode()
    assert messages_of(text, cuts) == [Message(event, data, id) for data, id, event in sent]


def test_a_message_that_was_not_ended_is_none() -> None:
    assert messages_of(b"data: a\n\ndata: b\n", []) == [Message("message", "a", None)]


def test_an_id_stays_until_another_comes() -> None:
    text = b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n"
    assert [message.id for message in messages_of(text, [])] == ["1", "1", ""]
