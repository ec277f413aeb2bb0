"""Write the locks beside this file, from pyproject.toml and constraints.txt: `make lock`.

    service.lock   the control plane
    workers.lock   what runs on Ray, all but torch
    torch.lock     torch as the default index has it: for CUDA on Linux, with the libraries that this build brings
    build.lock     what makes our own wheel

Each pin has the hashes of all files of its release, so a lock holds for every platform and Python of pyproject.toml.
`torch-cpu.lock` is kept by hand, for its builds are on an index of their own.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
#: `uv` beside this Python; an index is taken from the environment, and never written down.
COMPILE = (sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version=3.11", "--generate-hashes")
STYLE = ("--no-header", "--no-annotate", "--quiet", "--constraints=constraints.txt")
TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")
BUILD = "setuptools>=77\n"
HEADER = "# Made by `make lock`. Install it with `pip install --require-hashes -r`.\n"


def compiled(*arguments: str, given: str = "") -> list[str]:
    """Return the pins, each a text of some lines: the release, and its hashes."""
    command = (*COMPILE, *STYLE, *arguments)
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return re.findall(r"^\S.*(?:\n +.*)*", done.stdout, re.MULTILINE)


def write(name: str, pins: list[str]) -> None:
    (FOLDER / name).write_text(HEADER + "\n".join(pins) + "\n")


def main() -> None:
    write("service.lock", compiled("--extra=service", "pyproject.toml"))
    workers = compiled("--extra=workers", "pyproject.toml")
    write("workers.lock", [pin for pin in workers if not TORCH.match(pin)])
    write("torch.lock", [pin for pin in workers if TORCH.match(pin)])
    write("build.lock", compiled("-", given=BUILD))


if __name__ == "__main__":
    main()
