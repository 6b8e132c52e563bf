"""A container's health as exit code 0 or 1: that of its Ray node if it runs one, otherwise whether a job's imports work."""

import os
import sys
import urllib.request

# Ray's agent on every node, on its default port; it answers this one request without a token.
PORT = int(os.environ.get("HEARTSEG_CLUSTER_AGENT_PORT", 52365))
SECONDS = 20


def main() -> int:
    """Return 0 if the container is healthy, otherwise 1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/healthz", timeout=SECONDS) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        if not isinstance(getattr(error, "reason", None), ConnectionRefusedError):
            return 1  # the node is unhealthy or hangs
    # Nothing listens: the container runs a job, not a node.
    import ray  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    import heartseg  # noqa: F401

    return 0


if __name__ == "__main__":
    sys.exit(main())
