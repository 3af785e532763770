"""Faults in files, caches and disks, injected for real: C05 and C15 to C21 of the catalogue."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from data_command import Desk, chat, list_chats, read_ids, write_rows
from pyarrow import parquet

from forge_cli.data import prepare
from forge_cli.units import MIB

COMMAND = [sys.executable, "-m", "forge_cli", "data", "check", "run.yaml"]


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys) -> Desk:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Desk(capsys)


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# C05: one row of 50 MB.


def measure_peak_bytes(*arguments: str) -> tuple[int, int, str]:
    """Runs a command in a process of its own; returns exit code, peak of memory and what it wrote."""
    code = (
        "import atexit, re, sys\n"
        "atexit.register(lambda: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[0]))\n"
        "from forge_cli.cli.app import run_app; run_app(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, 1024 * int(re.findall(r"VmHWM:\s+(\d+)", done.stdout)[-1]), done.stderr + done.stdout


def test_c05_one_row_of_50_mb(desk):
    settings = {"on_bad_row": "skip", "max_bad_ratio": 0.5}
    assert desk.report(list_chats(3), **settings)["splits"][0]["rows_kept"] == 3
    shutil.rmtree("cache")
    code, small_bytes, _ = measure_peak_bytes("data", "check", "run.yaml")
    assert code == 0
    huge = b'{"messages": [{"role": "user", "content": "' + b"a " * (25 * MIB) + b'"}]}\n'
    write_rows("rows.jsonl", [*list_chats(3), huge, chat("and", "on")])
    code, big_bytes, text = measure_peak_bytes("data", "check", "run.yaml")
    assert code == 0, text
    assert re.search(r"bad, skipped +1\n", text) and re.search(r"rows kept +4\n", text)
    assert big_bytes - small_bytes < 40 * MIB, "16 MiB of it are looked at, and held at most twice"
    first, _ = desk.refuse(None)
    assert first.startswith("error: rows.jsonl:4: the line is 50.0 MiB long, more than 16.0 MiB")


def test_c05_a_row_of_a_million_tokens_is_not_made_of_them(desk):
    write_rows("rows.jsonl", [*list_chats(3), chat("again", "0123456789" * 100_000)])
    Path("run.yaml").write_text(
        "model: {name: forge-tiny}\ndata: {train: rows.jsonl, max_length: 256, on_overlong: drop, max_lost_ratio: 1}\n"
    )
    code, peak_bytes, text = measure_peak_bytes("data", "check", "run.yaml")
    assert code == 0, text
    assert re.search(r"longest, before cutting +1,000,0\d\d\n", text), text
    assert peak_bytes < 200 * MIB, "twice this if only the tokens of the answer were made"


# C15, C16, C20: names that are no file.


def test_c15_a_folder_with_a_script(desk, tmp_path):
    Path("dataset").mkdir()
    Path("dataset/dataset.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write_rows("dataset/rows.jsonl", list_chats(2))
    (line,) = desk.refuse(None, train="dataset")
    assert line == (
        "error: dataset: a folder with the script dataset.py; scripts are never run; name its files: dataset/*.jsonl"
    )
    assert desk.report(None, train="dataset/*.jsonl")["splits"][0]["rows_kept"] == 2
    assert not Path("ran").exists()


def test_c16_a_folder_that_is_called_like_a_data_set_of_the_hub(desk):
    Path("org/name").mkdir(parents=True)
    write_rows("org/name/rows.jsonl", list_chats(2))
    (line,) = desk.refuse(None, train="org/name", code=5)
    assert line.startswith("error: org/name: ambiguous: ")
    assert "./org/name/*.jsonl" in line and "hf://org/name" in line
    assert desk.report(None, train="./org/name/*.jsonl")["splits"][0]["rows_kept"] == 2
    (line,) = desk.refuse(None, train="hf://org/name", code=5)
    assert "hf://org/name: the data set org/name is not on this machine" in line, "the folder is not taken for the hub"


def test_c20_paths(desk, tmp_path, monkeypatch):
    write_rows("rows.jsonl", list_chats(3))
    Path("inner").mkdir()
    Path("elsewhere").mkdir()
    write_rows("elsewhere/far.jsonl", list_chats(2))
    monkeypatch.chdir(tmp_path / "inner")
    os.symlink("../elsewhere/far.jsonl", "link.jsonl")
    assert desk.report(None, train="../rows.jsonl")["splits"][0]["rows_kept"] == 3
    assert desk.report(None, train="link.jsonl")["splits"][0]["rows_kept"] == 2
    assert desk.report(None, train="../*/*.jsonl")["splits"][0]["rows_kept"] == 4
    (line,) = desk.refuse(None, train="../row*.json")
    assert line.startswith("error: ../row*.json: no file matches; .. holds rows.jsonl")
    (line,) = desk.refuse(None, train="nowhere/*.jsonl")
    assert "nowhere/*.jsonl: no file matches; there is no folder nowhere" in line
    os.symlink("gone.jsonl", "dangling.jsonl")
    (line,) = desk.refuse(None, train="dangling.jsonl", code=2)
    assert "no such file: dangling.jsonl" in line
    os.mkfifo("pipe.jsonl")
    (line,) = desk.refuse(None, train="pipe.jsonl", code=2)
    assert "pipe.jsonl is not a regular file" in line
    (line,) = desk.refuse(None, train="pipe*")
    assert "pipe.jsonl: not a regular file" in line


# C17: somebody writes to a file between the two passes.


def replace_answer(text: str) -> str:
    return text.replace('"answer 7"', '"answer 8"')


CHANGES = {
    "edited": replace_answer,
    "appended": lambda text: text + json.dumps(chat("more", "rows")) + "\n",
    "cut": lambda text: "".join(text.splitlines(keepends=True)[:9]),
    "emptied": lambda text: "",
    "broken": lambda text: "{\n" + "".join(text.splitlines(keepends=True)[1:]),
    "bad row": lambda text: '{"messages": 5}\n' + "".join(text.splitlines(keepends=True)[1:]),
    "other format": lambda text: '{"text": "a"}\n' + "".join(text.splitlines(keepends=True)[1:]),
    "no mapping": lambda text: "5\n" + text,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_c17_a_file_changes_while_it_is_read(desk, monkeypatch, change, split):
    choose_rows = prepare.choose_rows

    def write_between(*arguments):
        Path(f"{split}.jsonl").write_text(CHANGES[change](text))
        return choose_rows(*arguments)

    text = "".join(json.dumps(row) + "\n" for row in list_chats(20))
    settings = {"train": "train.jsonl", "eval": "eval.jsonl"}
    Path("train.jsonl").write_text(text)
    Path("eval.jsonl").write_text(text.replace("question", "another"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "choose_rows", write_between)
        lines = desk.refuse(None, **settings)
    place = f"{split}.jsonl"
    if change == "bad row":
        assert lines[0] == f"error: {place}:1: messages is not a list of turns, but the number 5"
    else:
        assert lines == [f"error: {place}: the file changed while it was read; run again when nothing writes to it"]
    assert list_files(Path("cache")) == []


def test_c17_a_file_appears_while_others_are_read(desk, monkeypatch):
    choose_rows = prepare.choose_rows
    write_rows("b.jsonl", list_chats(5))

    def write_between(*arguments):
        write_rows("a.jsonl", list_chats(7))
        return choose_rows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "choose_rows", write_between)
        (line,) = desk.refuse(None, train="*.jsonl")
    assert line.startswith("error: *.jsonl: the file changed while it was read")
    report = desk.report(None, train="*.jsonl")
    assert (report["splits"][0]["rows_kept"], report["from_cache"]) == (12, False)


def test_c17_a_file_that_changed_since_is_read_again(desk):
    assert desk.report(list_chats(5))["from_cache"] is False
    assert desk.report(list_chats(5))["from_cache"] is True
    times = os.stat("rows.jsonl")
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("answer 3", "answer 9"))
    os.utime("rows.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    report = desk.report(None)
    assert report["from_cache"] is False, "size and time are the same, the content is not"


# C18: tokens of an earlier run that are damaged or foreign.


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def replace_in_manifest(folder: Path, **changes: object) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


DAMAGES = {
    "a byte of the tokens": lambda folder: flip(folder / "train.arrow", 0.5),
    "a byte of the header": lambda folder: flip(folder / "train.arrow", 0.0),
    "a byte of the questions": lambda folder: flip(folder / "questions.jsonl", 0.5),
    "cut tokens": lambda folder: os.truncate(folder / "train.arrow", 100),
    "no tokens": lambda folder: (folder / "eval.arrow").unlink(),
    "cut manifest": lambda folder: os.truncate(folder / "manifest.json", 200),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "other tokens' manifest": lambda folder: replace_in_manifest(folder, fingerprint="0" * 40),
    "another report": lambda folder: replace_in_manifest(folder, report={"splits": []}),
    "no files": lambda folder: replace_in_manifest(folder, files={}),
    "a count of the report": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"rows_read": 20', '"rows_read": 21')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_c18_damaged_tokens_are_made_again(desk, damage):
    write_rows("held.jsonl", [chat("held", "out")])
    settings = {"eval": "held.jsonl"}
    report = desk.report(list_chats(20), **settings)
    rows = desk.preview(None, *(f"--row={i}" for i in range(1, 21)), **settings)
    (folder,) = Path("cache/tokens").iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    DAMAGES[damage](folder)
    done = desk.check(None, "--json", **settings)
    assert done.err.startswith("tokens of an earlier run are made again: ")
    again = done.read_json()
    assert again["from_cache"] is False and again["splits"] == report["splits"]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"} == before
    assert desk.preview(None, *(f"--row={i}" for i in range(1, 21)), **settings) == rows
    done = desk.check(None, "--json", **settings)
    assert (done.read_json()["from_cache"], done.err) == (True, "")


def test_c18_tokens_of_another_template_are_not_used(desk):
    first = desk.report(list_chats(3))
    Path("other.jinja").write_text(
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor -%}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif -%}"
    )
    model = {"model": {"name": "forge-tiny", "chat_template": "other.jinja"}}
    second = desk.report(None, top=model)
    assert second["from_cache"] is False and second["fingerprint"] != first["fingerprint"]
    # The whole folder under the other's name: what its manifest says counts, not what the folder is called.
    tokens = Path("cache/tokens")
    shutil.rmtree(tokens / second["fingerprint"])
    shutil.copytree(tokens / first["fingerprint"], tokens / second["fingerprint"])
    done = desk.check(None, "--json", top=model)
    assert done.err == "tokens of an earlier run are made again: they belong to other rows\n"
    assert done.read_json()["splits"] == second["splits"] != first["splits"]


# C19: packed files and files of columns that end too early.


def write_packed(name: str) -> None:
    rows = list_chats(3000)
    text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(text))
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(name, "zstd") as file:
            file.write(text)
    elif name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), name, row_group_size=500)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(name, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    else:
        Path(name).write_text(json.dumps(rows))


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.jsonl.zst", "r.parquet", "r.arrow", "r.json"])
def test_c19_a_file_that_is_cut_off(desk, name):
    write_packed(name)
    assert desk.report(None, train=name)["splits"][0]["rows_read"] == 3000
    size_bytes = os.path.getsize(name)
    for left in (size_bytes - 1, size_bytes // 2, 20):
        os.truncate(name, left)
        lines = desk.refuse(None, train=name)
        assert lines[0].startswith(f"error: {name}"), lines
        assert "cut off" in lines[0] or "damaged" in lines[0], lines


# C21: the disk is full, or the system lets no more be written.


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("only root may mount a disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def read_needed_bytes(text: str) -> float:
    number, unit = re.search(r"need about ([\d.]+) ([KM]iB)", text).groups()
    return float(number) * {"KiB": 1024, "MiB": MIB}[unit]


def sum_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("count", [3000, 6000])  # in this process, and on all cores
def test_c21_the_disk_is_full(desk, small_disk, monkeypatch, count):
    rows = [chat(f"question {i} " + "w " * 20, f"answer {i} " + "v " * 20) for i in range(count)]
    assert desk.check(rows).code == 0
    needed_bytes = sum_bytes(Path("cache"))
    monkeypatch.setenv("FORGE_CACHE", str(small_disk))
    (line,) = desk.refuse(None, code=5)
    assert line.startswith(f"error: {small_disk}/tokens: the disk is full: the tokens need about ")
    assert read_needed_bytes(line) == pytest.approx(needed_bytes, rel=0.05)
    assert "and 1.0 MiB are free" in line and "set FORGE_CACHE to a folder on another disk" in line
    assert list_files(small_disk) == [] and shutil.disk_usage(small_disk).free > 0.98 * MIB
    assert desk.check(list_chats(50)).code == 0, "what fits is written"


def test_c21_a_limit_on_the_size_of_files(desk, tmp_path):
    rows = [chat(f"question {i} " + "w " * 20, f"answer {i} " + "v " * 20) for i in range(1500)]
    write_rows("rows.jsonl", rows)
    settings = {"model": {"name": "forge-tiny"}, "data": {"train": "rows.jsonl", "max_length": 128}}
    Path("run.yaml").write_text(yaml.safe_dump(settings))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, 256 * 1024))

    done = subprocess.run(COMMAND, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 5, done.stderr
    line, _ = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/cache/tokens: the system lets no more tokens be written")
    assert "and 256.0 KiB were written" in line
    assert list_files(Path("cache")) == []
    assert desk.check(None).code == 0
    assert read_needed_bytes(line) == pytest.approx(sum_bytes(Path("cache")), rel=0.05)


def test_c21_the_cache_is_no_folder(desk, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("FORGE_CACHE", "file/cache")
    (line,) = desk.refuse(list_chats(3), code=5)
    assert line == (
        "error: file/cache/tokens: tokens cannot be written: Not a directory; "
        "set FORGE_CACHE to a folder on another disk"
    )


def test_the_same_rows_give_the_same_tokens(desk):
    """What the tests above call equal is read from the tokens: it would differ for other rows."""
    (first,), (second,) = desk.preview([chat("a", "b")]), desk.preview([chat("a", "c")])
    assert read_ids(first) != read_ids(second)
