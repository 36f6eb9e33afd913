"""Load a set of some format in a process of its own, and print what that took.

    python -m tests.engine.data.measured_load KIND SMALL LARGE

The small set of the same format comes first, so that imports and lasting buffers are not counted. The last line is JSON: rows,
seconds (of the large set), growth (bytes of memory of the process's own at most, above what there was before; files that are only
mapped into memory are not its own), size (of the last row's image).
"""

import json
import sys
import threading
import time

import psutil

from engine.data.lesions import load_skin
from engine.data.masked_questions import load_masked_questions
from engine.data.questions import load_questions

LOADERS = {"questions": load_questions, "masks": load_masked_questions, "lesions": load_skin}


def own_memory() -> int:
    """Bytes; where the system does not tell what is mapped from files, all of them."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


class Peak:
    """The most memory inside the block above that at its start, looked at every two milliseconds."""

    def __enter__(self):
        self.before, self.growth, self.done = own_memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.growth = max(self.growth, own_memory() - self.before)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def main(kind: str, small: str, large: str) -> None:
    load = LOADERS[kind]
    load(small)
    start = time.perf_counter()
    with Peak() as peak:
        rows = load(large)
        seconds = time.perf_counter() - start
    last = rows[len(rows) - 1]
    image = last["image"] if "image" in last else last["images"][0]
    print(json.dumps({"rows": len(rows), "seconds": seconds, "growth": peak.growth, "size": image.size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
