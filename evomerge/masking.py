"""Passwords and keys inside URLs, which are shown as *** wherever a URL is shown."""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_plus

MASK = "***"
# names of query parameters whose values are nobody's business
SECRET = re.compile(r"pass|pwd|secret|tok|credential|auth|key|sig\b|signature")
_PARAMETER = re.compile(r"([?&;])([^=&;?#\s]{1,80})=([^&;#\s\"'<>]*)")


_HIDDEN: dict[str, str] = {}  # a value -> what is shown for it


def hide(name: str, value: str) -> None:
    """Show `${NAME}` for an environment variable's value from now on, if its name sounds secret.

    Values of up to three characters are left alone: they occur in other words.
    """
    if len(value) > 3 and _is_secret(name):
        _HIDDEN[value] = f"${{{name}}}"


def masked(text: str) -> str:
    """A text without hidden values, whose URLs show no password and no key.

    Takes time linear in its length.
    """
    for value, shown in _HIDDEN.items():
        text = text.replace(value, shown)
    if "://" not in text:
        return text
    words = []
    for word in re.split(r"(\s+)", text):
        words.append(masked_url(word) if "://" in word else word)
    return "".join(words)


def masked_url(url: str) -> str:
    """A URL without its password and without the values of secret parameters, as of `SECRET`.

    It need not be a valid URL: in `user:p@ss/word@host` everything up to the last @ is masked.
    """
    scheme, mark, rest = url.partition("://")
    user, colon, tail = rest.partition(":")
    if colon and not set(user) & {"/", "?", "@"}:
        secret, at, place = tail.rpartition("@")
        if at:
            rest = f"{user}:{MASK}@{place}" if secret else rest
    return scheme + mark + _PARAMETER.sub(_masked_parameter, rest)


def secrets_of(url: str) -> list[str]:
    """The passwords and keys of a URL as written and decoded, the longest first."""
    found = []
    rest = url.partition("://")[2]
    user, colon, tail = rest.partition(":")
    if colon and not set(user) & {"/", "?", "@"}:
        password = tail.rpartition("@")[0]
        # a reserved character that is not encoded splits a password, and a driver names a part
        found += [password, *re.split(r"[@/?#:]", password)]
    for match in _PARAMETER.finditer(rest):
        if _is_secret(match[2]):
            found.append(match[3])
    found += [*map(unquote, found), *map(unquote_plus, found)]
    return sorted({text for text in found if len(text) > 2}, key=len, reverse=True)


def without_secrets(text: str, url: str) -> str:
    """A text about a URL, such as a driver's message, without that URL's secrets."""
    for secret in secrets_of(url):
        text = text.replace(secret, MASK)
    return masked(text)


def has_secret(url: str) -> bool:
    """Whether a URL holds a password or a key."""
    return masked_url(url) != url


def _is_secret(name: str) -> bool:
    return SECRET.search(unquote_plus(name).lower()) is not None


def _masked_parameter(match: re.Match[str]) -> str:
    if not match[3] or match[3].startswith(MASK) or not _is_secret(match[2]):
        return match[0]
    return f"{match[1]}{match[2]}={MASK}"
