"""What requests call a model that has no table of its own."""

from __future__ import annotations

from pathlib import PurePath


def request_name(model: str) -> str:
    """Return "default" or "fake" as they are, ORG/NAME without its revision, of a file or directory its own name.

    Looks at nothing but the text: whoever builds the application may be on another machine than the files.
    """
    path = PurePath(model)
    if path.suffix == ".gguf":
        return path.stem
    is_path = model.startswith((".", "/", "~"))
    return path.name if is_path else model.partition("@")[0]
