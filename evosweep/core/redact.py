"""Removes credentials from text that is shown or saved."""

import re
from typing import Any

# Hydra puts a backslash before colons and equal signs of a job's overrides.
_CREDENTIALS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*\\?://)(?P<user>[^\s/@:'\"\\]*)(?P<secret>\\?:[^\s/'\"]*)?@"
)
_IN_QUERY = re.compile(r"(?P<key>[?&](?:ssl)?(?:password|passwd|pwd|token|access_token|api_key|secret)\\?=)[^&\s'\"]+")


def redact(value: Any) -> Any:
    """Return text without the credentials of URIs in it; lists and mappings are walked, anything else is kept.

    ``http://user:secret@host`` becomes ``http://user:***@host``; a token alone, ``https://token@host``, becomes
    ``https://***@host``; ``?password=secret`` becomes ``?password=***``.
    """
    if isinstance(value, str):
        return _IN_QUERY.sub(r"\g<key>***", _CREDENTIALS.sub(_masked, value))
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def _masked(found: re.Match[str]) -> str:
    return f"{found['scheme']}{found['user']}:***@" if found["secret"] else f"{found['scheme']}***@"
