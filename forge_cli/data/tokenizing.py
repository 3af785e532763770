"""The second pass: rows are tokenised on all cores, in the order of the files."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from forge_cli.data.row_tokens import Limits, Outcome, RowTokenizer
from forge_cli.errors import MemoryExceeded
from forge_cli.parts.rendering import Renderer

BATCH_ROWS = 256
# Starting workers costs more than it gains below this.
PARALLEL_ROWS = 4000

# Of a worker process, which starts with it rather than receiving it with every batch.
_tokenizer: RowTokenizer | None = None


def _start_worker(renderer: Renderer, limits: Limits) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    _tokenizer = RowTokenizer(renderer, limits)


def _tokenize_batch(rows: list[tuple[int, Mapping[str, object], bool]]) -> list[Outcome]:
    return _tokenizer.tokenize(rows)


def tokenize_rows(
    rows: Iterable[tuple[int, Mapping[str, object], bool]], renderer: Renderer, limits: Limits, num_rows: int
) -> Iterator[Outcome]:
    """Tokenises rows on all cores; outcomes come in the order of the rows.

    Args:
        rows: Number, columns, and whether a question is wanted.
        renderer: Of the model's tokenizer.
        limits: What becomes of rows.
        num_rows: About how many there are; few are done in this process.

    Raises:
        MemoryExceeded: A worker was killed, as the system does when memory runs out.
    """
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, BATCH_ROWS)), [])
    workers = count_cores()
    if num_rows < PARALLEL_ROWS or workers < 2:
        tokenizer = RowTokenizer(renderer, limits)
        for batch in batches:
            yield from tokenizer.tokenize(batch)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pending: deque[Future] = deque()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (renderer, limits)) as pool:
            # Only a few batches are under way, so that memory does not grow with the file.
            for batch in batches:
                pending.append(pool.submit(_tokenize_batch, batch))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise MemoryExceeded(
            "a process that tokenises rows was killed",
            why="the system does that when memory runs out",
            fix="split very long rows, or close other programs",
        ) from None


def count_cores() -> int:
    """Counts the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
