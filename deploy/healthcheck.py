"""The images' health check: exit code 0 if the server in this container answers 200, else 1 and why.

Without a URL it asks the control plane. Only the standard library, and never through a proxy.
"""

import os
import sys
from urllib.request import ProxyHandler, build_opener


def main() -> int:
    own = f"http://127.0.0.1:{os.environ.get('LOCKSTEP_PORT', '8700')}/healthz"
    url = sys.argv[1] if len(sys.argv) > 1 else own
    try:
        build_opener(ProxyHandler({})).open(url, timeout=4).close()  # anything but a success is an HTTPError
    except OSError as error:
        print(f"{url}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
