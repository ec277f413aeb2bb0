"""What a handler as the control plane's would write, kept."""

import json
import logging
from typing import Any, Literal

from service.logs import Formatter, Ids, Redaction


class Lines(logging.Handler):
    """A handler that keeps its lines."""

    def __init__(self, form: Literal["text", "json"] = "json", secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.addFilter(Ids())
        self.setFormatter(Formatter(form, Redaction(secrets)))
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.written]
