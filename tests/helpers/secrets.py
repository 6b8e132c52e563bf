"""What looks like a secret in a configuration file."""

import re
from collections.abc import Iterator

SECRET_NAME = re.compile(r"(^|[_-])(secret|password|passwd|token|api_?key|access_?key(_?id)?|private_?key)$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\b(gh[opsu]_|github_pat_|hf_|xox[abp]-)\w{20,}"  # GitHub, Hugging Face, Slack
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<![\w./-])[0-9a-fA-F]{40,}(?![\w./-])"  # a Ray token or W&B key: long, hexadecimal, no part of a path
)
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(\S+)")


def leaves(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Every (key, scalar) of nested dicts and lists, the scalar as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    elif value is not None:
        yield name, str(value)


def secrets_in(config: dict) -> list[str]:
    """The keys under which something looks like a secret, by its own look or by the name it is given to."""
    found = []
    for name, text in leaves(config):
        named = [(name, text), *ASSIGNMENT.findall(text)]
        if SECRET_VALUE.search(text) or any(SECRET_NAME.search(key) and "/" not in key for key, _ in named):
            found.append(name)
    return found
