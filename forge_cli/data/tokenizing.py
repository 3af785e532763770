"""The second pass: rows are tokenised on all cores, in the order of the files."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from forge_cli import faults
from forge_cli.data.outcomes import Limits, Outcome
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.errors import MemoryExceeded
from forge_cli.parts.rendering import Renderer

# Number, columns, and whether a question is wanted.
Row = tuple[int, Mapping[str, object], bool]
# A worker holds the rows of a batch several times over: as texts, as tokens, and on their way.
BATCH_ROWS = 64
BATCH_CHARACTERS = 2**16
# Starting workers costs more than it gains below this.
PARALLEL_ROWS = 4000

# Of a worker process, which starts with it rather than receiving it with every batch.
_tokenizer: RowTokenizer | None = None


def _start_worker(renderer: Renderer, limits: Limits) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    # Ctrl-C in a terminal reaches all processes; the parent decides. Its handlers are not for this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = RowTokenizer(renderer, limits)


def _end_with_parent() -> None:
    """Ends this process when its parent was killed: it would wait for rows for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize_batch(rows: list[Row]) -> list[Outcome]:
    return _tokenizer.tokenize(rows)


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Holds a signal that would end the process until the block asks for it; a second one is not held.

    What a handler raises in the middle of a pool's own work leaves its locks taken, and the process would never end.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.SIG_DFL if action is None else action for number, action in found.items()}

    def note(number: int, frame: object) -> None:
        held.append(number)
        if len(held) > 1:
            deliver()

    def deliver() -> None:
        if held:
            number = held[0]
            held.clear()
            signal.signal(number, before[number])
            signal.raise_signal(number)
            signal.signal(number, note)

    for number in before:
        signal.signal(number, note)
    try:
        yield deliver
    finally:
        for number, action in before.items():
            signal.signal(number, action)
        if held:
            signal.raise_signal(held[0])


def cut_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Cuts rows into batches by number and by size, so that long rows take no more memory than many."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(repr(row[1]))
        if len(batch) == 1:
            faults.reach("tokenize")
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_rows(rows: Iterable[Row], renderer: Renderer, limits: Limits, num_rows: int) -> Iterator[Outcome]:
    """Tokenises rows on all cores; outcomes come in the order of the rows.

    Args:
        rows: Number, columns, and whether a question is wanted.
        renderer: Of the model's tokenizer.
        limits: What becomes of rows.
        num_rows: About how many there are; few are done in this process.

    Raises:
        MemoryExceeded: A worker was killed, as the system does when memory runs out.
    """
    batches = cut_batches(rows)
    workers = count_cores()
    if num_rows < PARALLEL_ROWS or workers < 2:
        tokenizer = RowTokenizer(renderer, limits)
        for batch in batches:
            yield from tokenizer.tokenize(batch)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pending: deque[Future] = deque()
    gc.freeze()  # a collection would write to the pages that processes share, and so copy them for each
    try:
        with (
            held_signals() as deliver_signals,
            ProcessPoolExecutor(workers, context, _start_worker, (renderer, limits)) as pool,
        ):
            # Only a few batches are under way, so that memory does not grow with the file.
            for batch in batches:
                deliver_signals()
                pending.append(pool.submit(_tokenize_batch, batch))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                deliver_signals()
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise MemoryExceeded(
            "a process that tokenises rows was killed",
            why="the system does that when memory runs out",
            fix="split very long rows, or close other programs",
        ) from None
    finally:
        gc.unfreeze()


def count_cores() -> int:
    """Counts the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
