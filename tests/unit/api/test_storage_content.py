"""Views read one after another are the bytes that they would be if they were joined."""

import io
from array import array

from hypothesis import given
from hypothesis import strategies as st

from api.content import Content

PIECES = st.lists(st.binary(max_size=20), max_size=8)
PLACE = st.integers(0, 60)


@given(PIECES, PLACE, PLACE)
def test_any_part_of_the_views_is_that_part_of_the_joined_bytes(pieces: list[bytes], start: int, stop: int) -> None:
    content, joined = Content([memoryview(piece) for piece in pieces]), b"".join(pieces)
    assert content.size == len(joined)
    assert content.read() == joined
    assert content.read(start, stop) == joined[start:stop]


@given(PIECES, PLACE, PLACE, st.lists(st.one_of(st.integers(0, 30), st.tuples(st.integers(0, 60), st.integers(0, 2)))))
def test_a_file_over_a_part_reads_and_seeks_like_one_in_memory(
    pieces: list[bytes], start: int, stop: int, steps: list[int | tuple[int, int]]
) -> None:
    content = Content([memoryview(piece) for piece in pieces])
    start, stop = sorted((min(start, content.size), stop))
    file, model = content.file(start, stop), io.BytesIO(b"".join(pieces)[start:stop])
    for step in steps:
        if isinstance(step, int):
            assert file.read(step) == model.read(step)
        else:
            offset, whence = step if step[1] == 0 else (0, step[1])
            size = len(model.getvalue())
            assert file.seek(min(offset, size), whence) == model.seek(min(offset, size), whence)
        assert file.tell() == model.tell()
    assert file.read() == model.read()


def test_views_of_other_things_than_bytes_count_as_their_bytes() -> None:
    numbers = array("i", [1, 2, 3])
    content, joined = Content([memoryview(numbers), memoryview(b"x")]), numbers.tobytes() + b"x"
    assert content.size == len(joined)
    assert content.read(2, 9) == joined[2:9]
