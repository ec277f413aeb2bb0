"""What the tests of the images read: Dockerfiles, `.dockerignore`, pins and the compose files."""

import fnmatch
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile.service", "Dockerfile.worker", "Dockerfile.s3")

_FLAG = re.compile(r"--[a-z-]+(=\S+)?\s+")
_VARIABLE = re.compile(r"\$\{(\w+)(?::?([-+])([^{}]*))?\}|\$(\w+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its word, its flags (`--from=build`), and the rest on one line."""

    word: str
    flags: tuple[str, ...]
    text: str

    @property
    def words(self) -> list[str] | None:
        """The words of the exec form; None if this is for a shell."""
        try:
            parsed = json.loads(self.text)
        except ValueError:
            return None
        return parsed if isinstance(parsed, list) else None


@dataclass
class Stage:
    name: str
    base: str
    """As it stands there, with its variables."""
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, word: str) -> list[Instruction]:
        return [found for found in self.instructions if found.word == word]

    def last(self, word: str) -> Instruction:
        return self.all(word)[-1]

    @property
    def environment(self) -> dict[str, str]:
        pairs = (pair.partition("=") for line in self.all("ENV") for pair in line.text.split())
        return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class Dockerfile:
    arguments: dict[str, str]
    """Those before the first stage, with their defaults."""
    stages: list[Stage]

    @property
    def final(self) -> Stage:
        return self.stages[-1]

    def base(self, stage: Stage) -> str:
        """Return the image that a stage begins with, by default."""
        return expand(stage.base, self.arguments)


def read_dockerfile(name: str) -> Dockerfile:
    """Parse one of ours: no heredocs, no escape directive."""
    parsed = Dockerfile({}, [])
    for instruction in map(_instruction, _logical_lines((DEPLOY / name).read_text())):
        if instruction.word == "FROM":
            base, _, alias = instruction.text.partition(" AS ")
            parsed.stages.append(Stage(alias, base))
        elif parsed.stages:
            parsed.stages[-1].instructions.append(instruction)
        elif instruction.word == "ARG":
            argument, _, default = instruction.text.partition("=")
            parsed.arguments[argument] = default
        else:
            raise ValueError(f"{name}: {instruction.word} before the first FROM")
    return parsed


def _logical_lines(text: str) -> list[str]:
    """Join continuations; comments vanish, also between the lines of one instruction."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line.strip() for line in joined.splitlines() if line.strip()]


def _instruction(line: str) -> Instruction:
    word, _, rest = line.partition(" ")
    flags = list[str]()
    while match := _FLAG.match(rest):
        flags.append(match.group().strip())
        rest = rest[match.end() :].lstrip()
    if word == "HEALTHCHECK":
        rest = rest.removeprefix("CMD").lstrip()
    return Instruction(word, tuple(flags), rest)


def expand(text: str, values: dict[str, str]) -> str:
    """Put values for `$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+alternative}`, as a shell would."""

    def value(match: re.Match[str]) -> str:
        given = values.get(match[1] or match[4], "")
        if match[2] == "+":
            return expand(match[3], values) if given else ""
        return given or match[3] or ""

    return _VARIABLE.sub(value, text)


def copied(stage: Stage) -> list[tuple[list[str], str]]:
    """Return sources and destination of each COPY from the context."""
    copies = [found.text.split() for found in stage.all("COPY") if not any("--from" in flag for flag in found.flags)]
    return [(words[:-1], words[-1]) for words in copies]


def excluded(path: str) -> bool:
    """Whether `.dockerignore` keeps a path out of the context: the last pattern that matches it or a parent decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if _matches(path, pattern.removeprefix("!").strip("/")):
            verdict = not pattern.startswith("!")
    return verdict


def _matches(path: str, pattern: str) -> bool:
    anywhere = pattern.startswith("**/")
    wanted = pattern.removeprefix("**/").split("/")
    parts = path.split("/")
    starts = range(len(parts)) if anywhere else range(1)
    return any(
        len(parts) >= start + len(wanted) and all(map(fnmatch.fnmatchcase, parts[start:], wanted)) for start in starts
    )


def copy_context(stage: Stage, folder: Path) -> None:
    """Do what the COPY instructions of a stage do, into a folder that stands for its working directory."""
    for sources, destination in copied(stage):
        for source in sources:
            target = folder / destination / (Path(source).name if destination.endswith("/") else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=_ignore)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / source, target)


def _ignore(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if excluded(str((Path(folder) / name).relative_to(ROOT)))]


def pins() -> dict[str, str]:
    """Return the versions in constraints.txt by normalised name."""
    lines = (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in lines}


def locked(name: str) -> dict[str, str]:
    """Return the versions that a lock has for this machine, by normalised name."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [Requirement(line.removesuffix("\\")) for line in lines if line and line[0] not in "# "]
    here = [wanted for wanted in found if wanted.marker is None or wanted.marker.evaluate()]
    return {canonicalize_name(wanted.name): str(wanted.specifier).removeprefix("==") for wanted in here}


def project() -> dict[str, Any]:
    """Return pyproject's `[project]`."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def read_compose(name: str = "compose.yaml") -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / name).read_text()))


def make_secrets(folder: Path) -> Path:
    """Run `deploy/make-secrets.sh`; return the folder that it filled."""
    done = subprocess.run([DEPLOY / "make-secrets.sh", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder
