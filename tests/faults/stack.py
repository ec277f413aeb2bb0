"""`lockstep-server up` with a fault proxy in front of its S3 server, so that all of a real stack meets a bad store.

    python -m tests.faults.stack --state FOLDER --cpus 4 --port N --dashboard-port N --s3-port N --metrics-port N

The faults are those that `STATE/faults.json` asks for (tests/faults/proxy.py); without that file there are none.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from service.stack import HOST, installed_programs
from service.up import Options, up
from tests.faults.proxy import fault_proxy, obey_for_ever
from tests.servers import free_port

CONTROL = "faults.json"


def main() -> int:
    """Run `up`, or, as the S3 server that `up` starts, the proxy with the real server behind it."""
    if sys.argv[1:3] == ["serve", "s3"]:
        return serve(sys.argv[3:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, required=True)
    for number in ("cpus", "port", "dashboard-port", "s3-port", "metrics-port"):
        parser.add_argument(f"--{number}", type=int, required=True)
    programs = installed_programs()
    behind_proxy = (sys.executable, "-m", "tests.faults.stack")
    return up(Options(**vars(parser.parse_args()), programs=type(programs)(s3=behind_proxy, ray=programs.ray)))


def serve(options: list[str]) -> int:
    """Serve the last option, a folder, at the port of `--addr`; the server itself listens at another one."""
    public = int(next(option for option in options if option.startswith("--addr=")).rpartition(":")[2])
    private, (rclone,) = free_port(), installed_programs().s3
    rest = [option for option in options if not option.startswith("--addr=")]
    server = subprocess.Popen([rclone, "serve", "s3", f"--addr={HOST}:{private}", *rest], env=os.environ)
    with fault_proxy(f"http://{HOST}:{private}", public) as proxy:
        obey_for_ever(proxy, Path(options[-1]).parent / CONTROL, lambda: server.poll() is None)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
