"""What is held in memory does not grow with the rows, but by the two bytes that say how often each is drawn."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest

from forge_cli.data.bad_rows import BadRows
from forge_cli.data.choosing import choose_rows
from forge_cli.data.outcomes import Outcome
from forge_cli.data.read_row import DataFile
from forge_cli.data.report import SplitCounter, SplitReport
from forge_cli.data.scan import Place, Scan
from forge_cli.data.tokenizing import BATCH_CHARACTERS, BATCH_ROWS, cut_batches
from forge_cli.schema.data import DataSection, list_sources

ROWS = 100_000


def measure_peak(work) -> float:
    """Returns the peak of what Python allocates during work, in bytes a row."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / ROWS
    finally:
        tracemalloc.stop()


def test_counting_rows_holds_none_of_them(tmp_path):
    counter = SplitCounter(SplitReport("train", "tokens", ROWS, 512), str)

    def count() -> None:
        for number in range(ROWS):
            ids = array("i", [number, number % 7])
            counter.add(Outcome(number, "kept", ({"input_ids": ids, "labels": ids},), 2, 2, has_end=True), 1)

    assert measure_peak(count) < 1
    assert counter.report.rows_kept == ROWS


@pytest.mark.parametrize("source", [{}, {"weight": 1.5}, {"rows": ROWS // 2}])
def test_drawing_rows_takes_two_bytes_each(source):
    data = DataSection(train=[{"path": "rows.jsonl", **source}], eval_fraction=0.3)
    scan = Scan("train", list_sources(data.train), BadRows(data), counts=[ROWS])
    assert measure_peak(lambda: choose_rows(scan, data, 0)) < 3


def test_a_bad_row_takes_its_number():
    scan = Scan("train", [], BadRows(DataSection(train="rows.jsonl")))
    scan.places.append(Place(0, DataFile("rows.jsonl", None, "jsonl")))

    def refuse() -> None:
        for number in range(ROWS):
            scan.refuse(number, f"turn {number} is an empty answer")

    assert measure_peak(refuse) < 10
    scan.refuse(ROWS + 5, "half a character")
    scan.refuse(ROWS + 2, "half a character")  # the second pass comes after the first
    assert [row for row in range(ROWS - 1, ROWS + 9) if scan.is_skipped(row)] == [ROWS - 1, ROWS + 2, ROWS + 5]


@pytest.mark.parametrize(("characters", "most"), [(10, BATCH_ROWS), (BATCH_CHARACTERS // 4, 4), (BATCH_CHARACTERS, 1)])
def test_long_rows_come_in_small_batches(characters, most):
    rows = [(number, {"text": "x" * characters}, False) for number in range(200)]
    batches = list(cut_batches(rows))
    assert [row for batch in batches for row in batch] == rows
    assert max(map(len, batches)) == most
