"""Text for a run folder, which is shown around: without the keys and passwords of who started the run."""

import os
import re

# In names of environment variables.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_SHORTEST = 8  # characters; `none` or `true` is a word and no secret
_LOGIN = re.compile(r"(?<=://)[^/?#\s]+(?=@)")  # of an address; a password may hold an @


def without_secrets(text: str) -> str:
    """`***` where the value of a secret environment variable stood, or the login of an address."""
    values = {value.strip() for name, value in os.environ.items() if _SECRET.search(name)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return _LOGIN.sub("***", text)
