"""A process that extracts, one job after another: `python -m caravan.data.extract.worker`.

It reads jobs from standard input and answers on standard output, each as 4 bytes of length and JSON, then 8
bytes of length and raw bytes (the page; empty in answers). A job that takes too long is ended by the kernel
(an alarm without a handler stops C code too); memory is limited for the whole process. Its parent's end
closes its input, and it ends.
"""

from __future__ import annotations

import importlib
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

import orjson

from caravan.data.extract.problems import Unreadable

HEAD = struct.Struct("<IQ")


def send(file: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    """Write one message."""
    words = orjson.dumps(head)
    file.write(HEAD.pack(len(words), len(body)) + words)
    file.write(body)
    file.flush()


def receive(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read one message; None at the end."""
    lengths = file.read(HEAD.size)
    if len(lengths) < HEAD.size:
        return None
    words, body = HEAD.unpack(lengths)
    head = file.read(words)
    data = file.read(body)
    return (orjson.loads(head), data) if len(head) == words and len(data) == body else None


def page(job: dict[str, Any], body: bytes) -> dict[str, Any]:
    """An HTML page to text."""
    from caravan.data.extract import encoding, html

    decoded = encoding.decode(body, job.get("charset"), html=True)
    if decoded.damaged > 0.01 * len(decoded.text) + 1:
        raise Unreadable(f"a page in the encoding it declares ({decoded.encoding} does not fit)")
    found = html.extract(decoded.text, job.get("url"), job["engine"])
    return {"text": found.text, "title": found.title, "engine": found.engine, "encoding": decoded.encoding}


def file(job: dict[str, Any], body: bytes) -> dict[str, Any]:
    """A file (pdf, epub, docx) to text."""
    module = importlib.import_module(f"caravan.data.extract.{job['format']}")
    text, title = module.text(os.fsdecode(bytes.fromhex(job["path"])), job["limit"])
    return {
        "text": text.encode("utf-8", "replace").decode(),
        "title": title.encode("utf-8", "replace").decode(),
    }


WORK = {"page": page, "file": file}


def main() -> None:
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    memory, (_, allowed) = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:  # `ulimit -v`: it cannot be raised
        memory = min(memory, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while (message := receive(source)) is not None:
        job, body = message
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        try:
            answer = WORK[job["work"]](job, body)
        except Unreadable as error:
            answer = {"expected": str(error)}
        except MemoryError:
            answer = {"expected": "something that can be read in the memory a job may take"}
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RuntimeError,
            AssertionError,
            OSError,
        ) as e:
            answer = {"expected": f"something that can be read ({type(e).__name__}: {str(e)[:150]})"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, answer)


if __name__ == "__main__":
    main()
