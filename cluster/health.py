"""A container's health, as exit code 0 or 1: its Ray's word where one runs in it, else whether a job's imports work."""

import os
import sys
import urllib.request

# Ray's agent on every node, on its default port; this one question it answers without a token.
PORT = int(os.environ.get("HEARTSEG_CLUSTER_AGENT_PORT", 52365))
SECONDS = 20


def main() -> int:
    """0 where all is well."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/healthz", timeout=SECONDS) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        if not isinstance(getattr(error, "reason", None), ConnectionRefusedError):
            return 1  # a node that is ill or hangs
    # Nobody listens: a container that runs a job, and no node.
    import ray  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    import heartseg  # noqa: F401

    return 0


if __name__ == "__main__":
    sys.exit(main())
