"""Conversations to prompts, with the chat template that came with the model.

The template sees what templates written for `transformers` expect: messages, add_generation_prompt and the special
tokens; `router/template_sandbox.py` is where it runs. Knows no protobuf and no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from router.template_sandbox import METER, Meter, check_size, compile_template
from workers.errors import InvalidRequestError, ModelFileError

MAX_TEMPLATE_CHARACTERS = 1_000_000


class ChatTemplate:
    """One model's template, compiled once. `render` may be called from any thread."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens`: for instance ``{"bos_token": "<s>"}``. Raises ModelFileError if it does not compile."""
        self._special_tokens = dict(special_tokens or {})
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelFileError(
                f"a chat template must have at most {MAX_TEMPLATE_CHARACTERS} characters, has {len(source)}"
            )
        try:
            self._template = compile_template(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise ModelFileError(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt of `messages`, with the beginning of the assistant's turn.

        Raises InvalidRequestError, with the template's own words if it refuses them or with the limit that it broke.
        """
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            METER: Meter(),
        }
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in self._template.generate(variables):
                num_characters += len(piece)
                check_size(num_characters)
                pieces.append(piece)
        except Exception as error:  # whatever a stranger's program raises is about its input
            raise InvalidRequestError(f"prompt.messages: the model's chat template refuses them: {error}") from error
        return "".join(pieces)
