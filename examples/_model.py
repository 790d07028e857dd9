"""Where the agent's words come from: a model behind an OpenAI-compatible address if $OPENAI_BASE_URL is set, else the
quotes of _library.py, word by word at a reading pace.

$OPENAI_API_KEY and $OPENAI_MODEL go with the first, $RESEARCH_PACE (seconds per word) with the second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Generator

import pgchan
from pgchan.examples import _library

PACE_SECONDS = 0.05  # a report of about 400 words takes 20 seconds
SILENCE_SECONDS = 60  # after which a model that says nothing has failed
TASK = (
    "You write one section, about 120 words, of a report on what Python's standard library documents. Use only the "
    "source given, quote it at least twice, each quote on a line of its own that begins with '> '. No headings."
)


def pace() -> float:
    """Seconds between words when no model is asked."""
    return float(os.environ.get("RESEARCH_PACE", PACE_SECONDS))


async def words(topic: str, passage: _library.Passage, said: str) -> AsyncIterator[str]:
    """The text of a section in small pieces, from after `said` on."""
    if not os.environ.get("OPENAI_BASE_URL"):
        for word in re.findall(r"\S+\s*", _library.compose(topic, passage)[len(said) :]):
            await asyncio.sleep(pace())
            yield word
        return
    source = json.dumps({key: passage[key] for key in ("title", "documentation", "members")})
    messages = [
        {"role": "system", "content": TASK},
        {"role": "user", "content": f"The report is on: {topic}\nThe source of this section: {source}"},
    ]
    if said:
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Go on from exactly where you stopped, in mid-sentence if need be."},
        ]
    pieces = _ask(messages)
    with contextlib.suppress(ValueError):  # closing while a thread still waits for the next piece
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            pieces.close()


def _ask(messages: list[dict[str, str]]) -> Generator[str, None, None]:
    asked = {"model": os.environ.get("OPENAI_MODEL", "gpt-4o-mini"), "messages": messages, "stream": True}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"].rstrip("/") + "/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_SECONDS) as response:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    choices = json.loads(data).get("choices") or [{}]
                    if piece := choices[0].get("delta", {}).get("content"):
                        yield piece
    except urllib.error.HTTPError as error:
        if error.code == 429:
            raise pgchan.RetryAfter(float(error.headers.get("Retry-After") or 5)) from error
        if error.code < 500:
            raise pgchan.Fatal(f"the model's server answered {error.code} {error.reason}") from error
        raise
