"""What pydantic found, in words that fit into a line of ours."""

from collections.abc import Mapping
from typing import Any


def reason(error: Mapping[str, Any]) -> str:
    """Return the message of one of `ValidationError.errors()`, in lower case: a validator's own, without a prefix."""
    own = error.get("ctx", {}).get("error")
    message = str(own) if isinstance(own, Exception) else str(error["msg"])
    return message[:1].lower() + message[1:]
