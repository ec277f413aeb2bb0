"""What the pages lead to is there: files, headings, commands of ours, services of the compose file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from api.cli import app as client
from service.cli import app as server

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("helm/**/*.md")]
SERVICES = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
PROGRAMS: dict[str, Any] = {"lockstep": get_command(client), "lockstep-server": get_command(server)}
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@BY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@BY_PAGE
@pytest.mark.parametrize("program", PROGRAMS)
def test_commands_and_their_options_are_some_that_we_have(page: Path, program: str) -> None:
    for line in re.findall(rf"(?:^ *|[`/]|-- |exec service ){program} ([a-z][^`|#&<>\n]*)", code(page), re.MULTILINE):
        command, path = PROGRAMS[program], program
        for word in line.split():
            subcommands: dict[str, Any] = getattr(command, "commands", {})
            if not subcommands or not word[0].isalpha():
                break
            assert word in subcommands, f"{path} has no {word}"
            command, path = subcommands[word], f"{path} {word}"
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = set(re.findall(r"(?<=\s)--[a-z0-9-]+", line)) - known - {"--help"}
        assert not unknown, f"{path} has no {unknown}"


@BY_PAGE
def test_services_of_compose_are_in_its_file(page: Path) -> None:
    for words in re.findall(
        r"docker compose (?:exec|stop|start|rm|logs)((?: -{1,2}\w+)*(?: [a-z][\w-]*)+)", code(page)
    ):
        first = next(word for word in words.split() if not word.startswith("-"))
        assert first in SERVICES, words
    for word in re.findall(r"docker compose run [^\n]*\bservice (\S+)", code(page)):
        assert word in PROGRAMS["lockstep-server"].commands, "the image's entrypoint is lockstep-server"


def code(page: Path) -> str:
    """Return what stands in code of a page, one piece a line."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = (f"`{' '.join(span.split())}`" for span in re.findall(r"`([^`]+)`", rest))
    return "\n".join([*blocks, *spans])
