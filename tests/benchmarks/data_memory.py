"""How much memory ``forge data check`` needs, and how much of it a row: peak and growth while rows are tokenised.

    python tests/benchmarks/data_memory.py [--size-mb 60] [--row-bytes 1000 200] [--whole-mb 2000]

Writes files of conversations made of random words, and a model folder without weights: a tokenizer of 16,000 tokens
with the chat template of forge-tiny. Memory is what the command and its workers hold together, ten times a second:
anonymous pages, those that they share counted once, and the mapped files of the one that maps most. Unlike PSS it is
not less when other programs map the same libraries. Growth is measured over the second half. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

from data_scan import MB, make_lines

from forge_cli.paths import assets_root

SAMPLE_SECONDS = 0.1
LONGEST_TOKENS = 2**20
# How often a row is drawn is noted for all rows at once, before the first is tokenised.
DRAWN_BYTES = 2


def make_model(folder: Path) -> None:
    """Writes a model folder without weights: ``forge data`` reads its config and its tokenizer alone."""
    from tokenizers import Tokenizer, models, trainers

    folder.mkdir()
    tiny = assets_root() / "forge-tiny"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    small = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = small.pre_tokenizer, small.decoder
    special = [token.content for _, token in sorted(small.get_added_tokens_decoder().items())]
    words = islice(make_lines(20 * MB, 1000), 20_000)
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=tokenizer.pre_tokenizer.alphabet()
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((tiny / "config.json").read_text()) | {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": LONGEST_TOKENS,
    }
    (folder / "config.json").write_text(json.dumps(config))


def read_memory_bytes(pid: int) -> tuple[int, bool]:
    """Reads the memory of a process and its workers in bytes, and tells whether it has workers."""
    anonymous, mapped = 0, []
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *children):
        rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        found = {name: 1024 * int(kib) for name, kib in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
        anonymous += found["Pss_Anon"]
        mapped.append(found["Rss"] - found["Anonymous"])
    return anonymous + max(mapped), bool(children)


def write_files(folder: Path, size_bytes: int, row_bytes: int) -> int:
    """Writes rows and a run file; returns the number of rows."""
    rows = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for line in make_lines(size_bytes, row_bytes):
            file.write(line + "\n")
            rows += 1
    data = {"train": str(folder / "rows.jsonl"), "max_length": LONGEST_TOKENS}
    (folder / "run.yaml").write_text(json.dumps({"model": {"name": str(folder / "model")}, "data": data}))
    return rows


def measure(folder: Path) -> tuple[list[int], list[int]]:
    """Runs the command; returns its memory in bytes at equal intervals, with workers and without."""
    environment = {**os.environ, "FORGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "forge_cli", "data", "check", str(folder / "run.yaml")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    drain = threading.Thread(target=process.stderr.read)
    drain.start()
    samples: tuple[list[int], list[int]] = ([], [])
    while process.poll() is None:
        with contextlib.suppress(OSError, KeyError):  # a process that begins or ends
            size_bytes, has_workers = read_memory_bytes(process.pid)
            samples[not has_workers].append(size_bytes)
        time.sleep(SAMPLE_SECONDS)
    drain.join()
    assert process.returncode == 0
    shutil.rmtree(folder / "cache")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mb", type=int, default=60)
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[1000, 200])
    parser.add_argument("--whole-mb", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for row_bytes in options.row_bytes:
            rows = write_files(folder, options.size_mb * MB, row_bytes)
            busy, alone = measure(folder)
            tenth = len(busy) // 10
            grown_bytes = statistics.fmean(busy[-tenth:]) - statistics.fmean(busy[5 * tenth : 6 * tenth])
            slope = grown_bytes / (0.4 * rows)
            peak = max(busy + alone)
            more = rows * (options.whole_mb / options.size_mb - 1)
            print(
                f"{options.size_mb} MB in {rows:,} rows of {row_bytes} bytes: peak {peak / MB:.0f} MB "
                f"({max(alone) / MB:.0f} without workers), {slope:.1f} bytes a row; "
                f"{options.whole_mb} MB would need {(peak + (slope + DRAWN_BYTES) * more) / MB:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
