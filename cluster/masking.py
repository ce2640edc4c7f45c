"""What a secret looks like, and text without it. Records, logs and error messages pass through here.

A mask recognises names ("api_key", "Authorization") and formats ("hf_...", a private key), and the values of
this process's own secret environment variables. A secret that has none of the three is not recognised.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

MASK = "***"
VARIABLES = ("_KEY", "_PASS", "_PAT", "_PWD")  # endings of secret environment variables, beside _NAME
SHORTEST_VALUE = 8  # characters of an environment variable's value that is looked for in texts

# Words that name a secret in every place, and "key" where a word beside it says which.
_NAME = (
    r"[\w.\[\]-]{0,40}(?:token|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:api|access|account|auth|private|secret|signing|encryption|wandb)[ _.-]?key)"
)
_QUOTE = r"""\\*(?:b(?=['"]))?["']?"""  # with the backslashes of text within text
_SPACE = r"(?:\s|\\+[nrt])*"
_VALUE = r"""(?:(?<=")[^"\r\n]+|(?<=')[^'\r\n]+|[^\s"'&,;)}\]]+)"""
_NUMBER = r"-?[\d.,]{1,12}(?:e[+-]?\d+)?(?![\w-])"  # "ms per token: 12.5" says no secret
_RULES = tuple(
    (re.compile(pattern, re.IGNORECASE), rf"\g<1>{MASK}\g<2>")
    for pattern in (
        r"()-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)()",
        r"(://)[^/?#\s\"']+(@)",
        # headers: all that follows on the line, or within the quotes
        rf"""((?:authorization|cookie){_QUOTE}{_SPACE}[:=,]{_SPACE}{_QUOTE})[^\r\n"'}}]+()""",
        r"(\bbearer\s+)[\w.~+/=-]{8,}()",
        r"(\blogin\s+\S+\s+password\s+)\S+()",  # .netrc
        # parameters of a URL, in which "key" alone is a key
        r"([?&;][\w.%\[\]-]{0,64}(?:key|token|secret|passw(?:or)?d|pwd|credential|signature|sig|auth)=)"
        r"[^&\s\"'#]*[^&\s\"'#,;:.)\]}]()",
        rf"((?<![\w-])--?{_NAME}[ =]{_QUOTE}){_VALUE}()",
        rf"""(\b{_NAME}{_QUOTE}{_SPACE}(?:=>|[:=]){_SPACE}{_QUOTE})(?!{_NUMBER}){_VALUE}()""",
        # a W&B key of 40 hexadecimal digits, which a commit is too: only where a word says so
        r"(\b(?:key|token|secret|password)\b(?s:.{0,24}?)\b)[0-9a-f]{40}\b()",
    )
)
_FORMATS = re.compile(
    r"\b(?:hf_\w{16,}|wandb_v1_\w{16,}|sk-[\w-]{16,}|gh[oprsu]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abeoprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|npm_\w{30,}"
    r"|pypi-[\w-]{16,}|nvapi-[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
_ARGUMENT_WORDS = ("key", "token", "secret", "password", "passwd")  # 'batch.tokens' is none of them


def mask(text: str) -> str:
    """`text` with `***` in place of what looks like a secret (see the module)."""
    return _mask(text, _own_secrets())


def masked(value: Any) -> Any:
    """A JSON-ready value with every string masked; strings under a secret's name are masked whole."""
    return _masked(value, _own_secrets())


def _mask(text: str, secrets: tuple[str, ...]) -> str:
    for value in secrets:
        text = text.replace(value, MASK)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _FORMATS.sub(MASK, text)


_mask_key = functools.lru_cache(4096)(_mask)  # every row of a record has the same keys


def _masked(value: Any, secrets: tuple[str, ...], name: object = None) -> Any:
    """`masked`, of the value under the key `name` of an object."""
    if isinstance(value, str):
        return MASK if value and is_secret(name) else _mask(value, secrets)
    if isinstance(value, dict):
        return {
            _mask_key(key, secrets) if isinstance(key, str) else key: _masked(each, secrets, key)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(each, secrets) for each in value]
    return value


def mask_secrets(command: Sequence[str]) -> list[str]:
    """The arguments of a command line, masked.

    Beside what `mask` finds, a secret is the value in `name=value` or `--name value` whose name has a word
    that ends in key, token, secret or password.
    """
    found: list[str] = []
    previous = ""
    for argument in command:
        name, equals, _ = argument.partition("=")
        if equals and _is_secret_argument(name):
            found.append(f"{name}={MASK}")
        elif previous.startswith("-") and "=" not in previous and _is_secret_argument(previous):
            found.append(MASK)
        else:
            found.append(mask(argument))
        previous = argument
    return found


@functools.lru_cache(4096)  # every call asks for each environment variable, every row for each key
def is_secret(name: object) -> bool:
    """Whether this is the name of a secret: `api_key`, `HF_TOKEN`, `password`; not `tokens`, not `key`."""
    return isinstance(name, str) and re.fullmatch(_NAME, name, re.IGNORECASE) is not None


def _is_secret_argument(name: str) -> bool:
    return any(word.endswith(_ARGUMENT_WORDS) for word in re.split(r"[^a-z0-9]+", name.lower()))


def _own_secrets() -> tuple[str, ...]:
    """Values of secret environment variables, the longest first: one may hold another."""
    names = [name for name in os.environ if is_secret(name) or name.upper().endswith(VARIABLES)]
    values = {os.environ[name].strip() for name in names}
    return tuple(sorted((value for value in values if len(value) >= SHORTEST_VALUE), key=len, reverse=True))
