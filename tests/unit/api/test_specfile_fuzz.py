"""Whatever is in a spec file: it is a mapping or refused in words, and the mapping a spec or refused by its fields."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from api.errors import faults_of
from api.spec import job_spec_adapter
from api.specfile import SpecFileError, read_spec
from tests.soak import soak

EXAMPLES = sorted((Path(__file__).parents[3] / "deploy" / "examples").glob("*.yaml"))
#: Pieces of YAML that mean something, most of them where they stand in the wrong place.
TAGS = "int float bool null str seq map set omap pairs binary timestamp merge value"
PIECES = [
    *"?:-[]{},&*#|>%@`'\"\\~!=\n\t\x00\ufeff\u2028\x85é\U0001f600",
    "name: a\n", "model: {size: 1m}\n", "? ", ": ", "- ", "  ", "&a ", "*a", "<<: ", "|\n ", ">\n ", "---\n", "...\n",
    *(f"!!{tag} " for tag in TAGS.split()),
    "!!python/object/apply:os.system ", "!<tag:yaml.org,2002:int> ", "%YAML 1.2\n", "0x", "0o", "1_000", "1e999",
    ".inf", ".nan", "9" * 5000, "12:30:45", "2001-13-41", "\\ud800", '"\\ud800"',
]  # fmt: skip


@st.composite
def yaml_texts(draw: st.DrawFn) -> str:
    """Pieces of YAML in any order; or an example with some of them put into it, or a part of it taken out."""
    text = "".join(draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12)))
    if draw(st.booleans()):
        whole = draw(st.sampled_from(EXAMPLES)).read_text()
        start, end = sorted((draw(st.integers(0, len(whole))), draw(st.integers(0, len(whole)))))
        text = whole[:start] + text + whole[end if draw(st.booleans()) else start :]
    return text


@given(text=yaml_texts(), suffix=st.sampled_from(["yaml", "json"]))
@example(text="[" * 5000, suffix="yaml")
@example(text="[" * 100_000, suffix="json")
@example(text='{"a":' * 100_000, suffix="json")
@example(text="- " * 5000, suffix="yaml")
@example(text="a: &a {<<: *a}", suffix="yaml")
@example(text="&a a: *a", suffix="yaml")
@example(text="a: !!float", suffix="yaml")
@example(text="a: !!int", suffix="yaml")
@example(text="a: !!bool maybe", suffix="yaml")
@example(text="a: !!timestamp soon", suffix="yaml")
@example(text="? [a]\n: b", suffix="yaml")
@settings(
    max_examples=soak(30_000, 300), deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@pytest.mark.soak
@pytest.mark.timeout(soak(1800, 300))
def test_a_file_holds_a_mapping_or_is_refused_in_words(tmp_path: Path, text: str, suffix: str) -> None:
    file = tmp_path / f"spec.{suffix}"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    spec = mapping_in(file)
    if spec is not None:
        assert_taken_or_refused_by_its_fields(spec)


def mapping_in(file: Path) -> dict[str, Any] | None:
    try:
        spec = read_spec(str(file))
    except SpecFileError as error:
        told = str(error)
    else:
        assert isinstance(spec, dict)
        return spec
    assert told.startswith(str(file))
    assert "Traceback" not in told
    return None


def assert_taken_or_refused_by_its_fields(spec: dict[str, Any]) -> None:
    try:
        job_spec_adapter.validate_python(spec)
    except ValidationError as error:
        faults = faults_of(list(error.errors()))
        assert faults
        assert all(fault.path.startswith("$") and fault.message for fault in faults)
