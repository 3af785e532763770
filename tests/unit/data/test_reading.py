"""A path names files, a data set of the hub, or nothing; it is never guessed which."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, load_dataset

from forge_cli.data.read_row import BadRow, DataFile, Row
from forge_cli.data.reading import find_files, fingerprint_file, read_file
from forge_cli.errors import DataError, ForgeError, MachineError

COMMIT = "0123456789" * 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The current folder, with a few files of rows."""
    for name in ("data/a10.jsonl", "data/a9.jsonl", "data/a09.jsonl", "data/deep/b.jsonl.gz", "data/x.csv", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(path: str, kind: type[ForgeError] = DataError) -> str:
    with pytest.raises(ForgeError) as caught:
        find_files(path)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("data/a9.jsonl", "data/a9.jsonl", "jsonl"),
        ("./data/x.csv", "./data/x.csv", "csv"),
        ("data/deep/b.jsonl.gz", "data/deep/b.jsonl.gz", "jsonl"),
        ("hf://org/name", "hf://org/name", "hub"),
        ("hf://org/name/subset@refs/pr/1", "hf://org/name/subset@refs/pr/1", "hub"),
        ("hf://data/a9.jsonl", "hf://data/a9.jsonl", "hub"),
        ("org/name", "org/name", "hub"),
        ("org/name@v1.0", "org/name@v1.0", "hub"),
    ],
)
def test_a_path_names_one_file(folder, path, name, kind):
    (file,) = find_files(path)
    assert (file.name, file.kind) == (name, kind)
    assert file.path == (None if kind == "hub" else Path(path))


def test_names_are_taken_as_they_are_before_they_are_patterns(folder):
    Path("a[1].TSV").write_text("text\na\n")
    Path("a1.tsv").write_text("text\nb\n")
    (file,) = find_files("a[1].TSV")
    assert list(read_file(file)) == [Row(2, {"text": "a"})]
    shutil.move("a[1].TSV", "other")
    assert [one.name for one in find_files("a[1].tsv")] == ["a1.tsv"]


def test_links_and_the_home_folder_are_followed(folder, monkeypatch):
    os.symlink(folder / "data" / "x.csv", folder / "link.csv")
    monkeypatch.setenv("HOME", str(folder))
    assert [find_files(path)[0].path for path in ("link.csv", "~/link.csv")] == [Path("link.csv"), folder / "link.csv"]


def test_patterns_come_in_natural_order(folder):
    assert [file.name for file in find_files("data/*.jsonl")] == ["data/a09.jsonl", "data/a9.jsonl", "data/a10.jsonl"]
    assert [file.name for file in find_files("data/**/*.jsonl*")] == [
        "data/a09.jsonl",
        "data/a9.jsonl",
        "data/a10.jsonl",
        "data/deep/b.jsonl.gz",
    ]
    assert [file.kind for file in find_files(f"{folder}/data/*")] == ["jsonl", "jsonl", "jsonl", "csv"]


def test_the_examples_are_there():
    (file,) = find_files("forge:quickstart/train")
    rows = list(read_file(file))
    assert len(rows) >= 200
    assert all(isinstance(row, Row) and "messages" in row.values for row in rows)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("data/*.parquet", "data/*.parquet: no file matches; data holds "),
        ("none/*.jsonl", "none/*.jsonl: no file matches; there is no folder none"),
        (
            "*",
            "notes.md: .md is not a known format; use .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow, and",
        ),
        ("notes.md", "notes.md: .md is not a known format"),
        ("data/a99.jsonl", "data/a99.jsonl: no such file; did you mean data/a"),
        ("./data/y.csv", "./data/y.csv: no such file; did you mean data/x.csv?"),
        (
            "data/a9.jsnl",
            "data/a9.jsnl: no such file; did you mean data/a9.jsonl? A data set of the hub is written hf://",
        ),
        ("train", "train: no such file; paths start at "),
        ("a/b/c", "a/b/c: no such file; paths start at "),
        ("forge:none", "forge:none: no such file; known: forge:"),
        ("hf://name", "hf://name: not the name of a data set; write hf://org/name[/subset][@revision]"),
        ("hf://a/b/c/d", "hf://a/b/c/d: not the name of a data set"),
        ("./data", "./data: a folder; name its files: ./data/*.jsonl"),
        ("data/deep/", "data/deep/: a folder; name its files: data/deep/*.jsonl.gz"),
        ("/dev/null", "/dev/null: not a regular file; name the file with the rows"),
        ("a\0b", "a\\x00b: "),
        ("x" * 5000, "x" * 5000 + ": not the name of a file: File name too long"),
        ("~nobody-of-this-name/x.jsonl", "~nobody-of-this-name/x.jsonl: not the name of a file: "),
    ],
)
def test_what_is_no_file_says_what_is_near(folder, path, wanted):
    assert refusal(path).startswith(wanted)


def test_the_files_of_a_folder_are_named_by_their_most_frequent_ending(folder):
    (folder / "mixed").mkdir()
    for name in ("a.csv", "b.parquet", "c.PARQUET", "d.parquet", "e.txt", "e.txt.md", "f.txt"):
        (folder / "mixed" / name).touch()
    assert refusal("./mixed") == "./mixed: a folder; name its files: ./mixed/*.parquet"


def test_an_empty_match_names_the_nearest_files(folder):
    assert "a9.jsonl" in refusal("data/a9.json*x").partition("data holds ")[2]


def test_a_fifo_is_refused_and_not_waited_for(folder):
    os.mkfifo("pipe.jsonl")
    assert refusal("pipe.jsonl") == "pipe.jsonl: not a regular file; name the file with the rows"
    assert refusal("*.jsonl") == "pipe.jsonl: not a regular file; name the file with the rows"


def test_a_link_to_nothing_is_no_file(folder):
    os.symlink("gone.jsonl", "link.jsonl")
    assert "link.jsonl: no such file" in refusal("link.jsonl")
    assert "No such file" in refusal("*.jsonl")


def test_a_folder_with_a_script_is_refused(folder):
    marker = folder / "was-run"
    Path("data/data.py").write_text(f"open({str(marker)!r}, 'w')")
    assert refusal(str(folder / "data")) == (
        f"{folder}/data: a folder with the script data.py; scripts are never run; name its files: {folder}/data/*.jsonl"
    )
    assert not marker.exists()


def test_a_folder_that_is_called_like_a_data_set_is_ambiguous(folder):
    assert refusal("data/deep", MachineError) == (
        "data/deep: ambiguous: a folder, and a name of the hub; "
        "write ./data/deep/*.jsonl.gz for the files of the folder, or hf://data/deep for the hub"
    )
    assert find_files("hf://data/deep") == [DataFile("hf://data/deep", None, "hub")]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes rights away from a part of the test, which root can")
def test_what_may_not_be_read_is_the_machines_fault(folder):
    (file,) = find_files(str(folder / "data/x.csv"))
    folder.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(MachineError, match="may not be read"):
            find_files(str(folder / "data/x.csv"))
        for read in (lambda: list(read_file(file)), lambda: fingerprint_file(file, "train")):
            with pytest.raises(MachineError, match="cannot be read: Permission denied"):
                read()
    finally:
        os.seteuid(0)


def test_a_fingerprint_is_of_the_bytes(folder):
    (file,) = find_files("data/x.csv")
    assert fingerprint_file(file, "train") == hashlib.blake2b(b'{"text": "a"}\n').hexdigest()
    os.utime("data/x.csv", (0, 0))
    before = fingerprint_file(file, "train")
    Path("data/x.csv").write_text('{"text": "b"}\n')
    assert hashlib.blake2b(b'{"text": "a"}\n').hexdigest() == before != fingerprint_file(file, "train")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch):
    """Puts a data set of the hub where the datasets library keeps its copies; the hub itself is out of reach."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def copy(rows: list[dict], commit: str = COMMIT) -> None:
        Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
        made = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "made"))
        source = Path(made["train"].cache_files[0]["filename"])
        kept = tmp_path / "cache" / "org___name" / "default" / "0.0.0" / commit
        kept.mkdir(parents=True)
        shutil.copy(source, kept / "name-train.arrow")
        info = json.loads(source.with_name("dataset_info.json").read_text())
        (kept / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "name"}))

    return copy


def test_rows_of_a_data_set_come_from_its_copy(copy, tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"{number}"}]} for number in range(1500)]
    copy(rows)
    # The library itself would take this folder for the data set.
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "rows.jsonl").write_text('{"text": "wrong"}\n')
    monkeypatch.chdir(tmp_path)
    for path in ("hf://org/name", f"hf://org/name@{COMMIT}", "hf://datasets/org/name", "hf://org/name/default"):
        (file,) = find_files(path)
        assert list(read_file(file)) == [Row(number, row) for number, row in enumerate(rows, 1)], path
    assert len(list(read_file(find_files("hf://org/name")[0], "train[:10%]"))) == 150


def test_a_data_sets_fingerprint_is_of_its_commit_and_split(copy):
    (file,) = find_files("org/name")
    prints = set()
    for number in (1, 2):
        copy([{"text": "a"}] * 4, COMMIT[:-1] + str(number))
        prints |= {fingerprint_file(file, split) for split in ("train", "train[:2]", "train")}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("path", "split", "kind", "wanted"),
    [
        ("org/name", "test", DataError, "Unknown split \"test\". Should be one of ['train'].; check the name and the"),
        ("hf://org/name/other", "train", DataError, "the data set cannot be loaded: Couldn't find cache for org/name"),
        ("org/none", "train", MachineError, "the data set org/none is not on this machine, and HF_HUB_OFFLINE is set"),
        (
            "org/name@main",
            "train",
            MachineError,
            f"the copy on this machine is of the revision {COMMIT}; write @{COMMIT}",
        ),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_of_our_errors(copy, path, split, kind, wanted):
    copy([{"text": "a"}])
    (file,) = find_files(path)
    with pytest.raises(kind) as caught:
        list(read_file(file, split))
    assert str(caught.value).startswith(f"{path}: ") and wanted in str(caught.value)


ROWS = [{"messages": [{"role": "user", "content": 'caf\u00e9 \\ "x"\n'}], "n": [1.5, None, True, -3e4]}] * 5
TEXTS = {
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "csv": 'a,b\n"x,\n1",2\n\u00e9,"q""q"\n1,2\n',
    "tsv": 'a\tb\n1\t2\n"3\n"\t4\n',
    "txt": "a\n\nb\n" * 5,
}
BITS = [
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\x1b",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\\",
    b"NaN",
    b"\xff",
    b"\xe2\x80\xa8",
    b"\xe2",
]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_whatever_stands_in_a_file_is_rows_bad_rows_or_one_of_our_errors(tmp_path, kind, packing):
    draw = random.Random(kind + packing)
    path = tmp_path / f"f.{kind}{packing}"
    yielded = 0
    for _ in range(150):
        content = bytearray(TEXTS[kind].encode())
        for _ in range(draw.choice([1, 2, 5])):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 0, 1, 9])] = draw.choice([*BITS, b"[" * 1500, b"1" * 4400, b""])
        with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(packing)) as stream:
            stream.write(content)
        if packing and draw.random() < 0.3:
            damaged = bytearray(path.read_bytes())
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
        last = 0
        try:
            for row in read_file(find_files(str(path))[0]):
                assert row.number > last
                last, yielded = row.number, yielded + 1
                assert isinstance(row, BadRow) or type(row.values) is dict
                assert isinstance(row, Row) or (row.what + row.fix).isprintable()
        except DataError as error:
            assert str(error).isprintable()
    assert yielded > 50
