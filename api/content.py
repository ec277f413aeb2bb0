"""What an object is made of: views of memory that lie anywhere, read one after another without joining them."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Content:
    """The bytes of some views one after another."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view.cast("B") for view in views if view.nbytes]
        self._ends = list(accumulate(len(view) for view in self._views))
        self.size = self._ends[-1] if self._ends else 0

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return a copy of the bytes from `start` to `stop`, or as far as there are any."""
        stop = self._within(stop)
        pieces, index = [], bisect_right(self._ends, start)
        while start < stop:
            piece = self._views[index][start - self._ends[index] :][: stop - start]
            pieces.append(piece)
            start, index = start + len(piece), index + 1
        return b"".join(pieces)

    def file(self, start: int = 0, stop: int | None = None) -> "ContentFile":
        """Return the bytes from `start` to `stop`, or as far as there are any, as a file."""
        return ContentFile(self, start, self._within(stop))

    def _within(self, stop: int | None) -> int:
        return self.size if stop is None else min(stop, self.size)


class ContentFile:
    """A part of a content, as a file that can be read piece by piece, and again: as much of one as the SDK needs."""

    def __init__(self, content: Content, start: int, stop: int) -> None:
        self._content, self._start, self._stop, self._at = content, start, stop, start

    def read(self, size: int | None = None) -> bytes:
        end = self._stop if size is None or size < 0 else min(self._at + size, self._stop)
        piece = self._content.read(self._at, end)
        self._at = end
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = min((self._start, self._at, self._stop)[whence] + offset, self._stop)
        return self.tell()

    def tell(self) -> int:
        return self._at - self._start
