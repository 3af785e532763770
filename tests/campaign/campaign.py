"""The whole campaign: every script in turn, one table at the end; with --write it goes into docs/reliability.md.

make chaos            (70 minutes on two cores, 30 minutes of which are fuzzing)
python tests/campaign/campaign.py --only kills,nan --write
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"
# Name, script and arguments, bar of the issue.
COMMANDS = {
    "kills": (["kills.py", "--kills", "200", "--seed", "20261127"], 1),
    "states": (["kills.py", "--states"], 2),
    "resume": (["resume_matrix.py"], 3),
    "corruptions": (["corruptions.py"], 4),
    "signals": (["signals.py"], 5),
    "ranks": (["ranks.py", "--count", "50"], 5),
    "nan": (["nan.py"], 6),
    "oom": (["oom.py"], 7),
    "disk": (["disk.py"], 8),
    "locks": (["locks.py"], 10),
    "fuzz": (["fuzz.py", "--minutes", "30"], 11),
}


def main() -> int:
    """Runs the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(COMMANDS), help="names with commas between")
    parser.add_argument("--write", action="store_true", help="write what came out into docs/reliability.md")
    options = parser.parse_args()
    failed = 0
    for name in options.only.split(","):
        arguments, bar = COMMANDS[name]
        began = time.monotonic()
        command = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        failed += done.returncode != 0
        verdict = "held" if done.returncode == 0 else "NOT held"
        place = f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, no GPU, {time.monotonic() - began:.0f} s"
        text = f"`python tests/campaign/{' '.join(arguments)}` ({place}): {verdict}.\n\n{keep_tables(done.stdout)}"
        print(f"### {name} (bar {bar})\n\n{text}\n", flush=True)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        if options.write:
            write_section(f"{name} (bar {bar})", text)
    return 1 if failed else 0


def write_section(title: str, text: str) -> None:
    """Replaces the section of one script on the page; those of the others stay."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    campaign, after = rest.split(END)
    parts = re.split(r"^### (.+)$", campaign, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True)) | {title: text}
    body = "".join(f"### {name}\n\n{what.strip()}\n\n" for name, what in sections.items())
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}{END}{after}", encoding="utf-8")


def keep_tables(output: str) -> str:
    """Keeps the tables of a script, the line above each and what follows it; not its progress."""
    lines = [line.rstrip() for line in output.splitlines()]
    first = next((number for number, line in enumerate(lines) if line.startswith("|")), 0)
    start = next((number for number in range(first - 1, -1, -1) if lines[number]), first)
    return "\n".join(lines[start:]).strip()


if __name__ == "__main__":
    sys.exit(main())
