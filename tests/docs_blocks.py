"""Takes README.md, CONTRIBUTING.md and docs apart: fenced blocks, command lines, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHELL = ("", "bash", "console", "sh")  # a block without a language may hold commands as well
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*(\S*)")
_MARK = re.compile(r"<!--\s*(run|not run)\b:?\s*(.*?)\s*-->")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Page it stands on, relative to the repository.
        line: Line of its fence, counted from 1.
        language: What stands behind the fence.
        text: What is inside.
        mark: ``run``, ``not run`` or nothing: the comment in the line above.
        reason: What the mark gives as its reason.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        """Where it stands: ``README.md:12``."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell line.

    Attributes:
        place: Page and line.
        words: Program and arguments.
        target: File that its output is sent to; empty if none.
        fails: The page shows that it ends with an error.
        mark: That of its block.
    """

    place: str
    words: tuple[str, ...]
    target: str = ""
    fails: bool = False
    mark: str = ""


def list_pages() -> list[str]:
    """Lists the pages by their path in the repository."""
    first = [name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).is_file()]
    return first + sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))


def read_page(page: str) -> str:
    """Reads a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def list_blocks(page: str, text: str | None = None) -> list[Block]:
    """Lists the fenced blocks of a page.

    Args:
        page: Path in the repository.
        text: Its text; read from the page if left out.
    """
    lines = (read_page(page) if text is None else text).splitlines()
    blocks, opened, start = [], None, 0
    for number, line in enumerate(lines):
        found = _FENCE.match(line)
        if opened is None and found:
            opened, start = found, number
        elif opened and line.strip().startswith(opened[1]) and not line.strip().strip(opened[1][0]):
            above = next((one for one in reversed(lines[:start]) if one.strip()), "")
            mark = _MARK.search(above)
            inside = "\n".join(lines[start + 1 : number]) + "\n"
            blocks.append(Block(page, start + 1, opened[2].lower(), inside, *(mark.groups() if mark else ())))
            opened = None
    assert opened is None, f"{page}:{start + 1}: a fence that is never closed"
    return blocks


def list_commands(block: Block) -> list[Command]:
    """Lists the commands of a shell block; with prompts in it, all other lines are output."""
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    prompted = any(line.lstrip().startswith("$ ") for line in lines)
    commands: list[Command] = []
    for number, line in enumerate(lines):
        if prompted and not line.lstrip().startswith("$ "):
            continue
        following = lines[number + 1] if prompted and number + 1 < len(lines) else ""
        for words in _split(line.strip().removeprefix("$ ")):
            target = words[words.index(">") + 1] if ">" in words else ""
            words = words[: words.index(">")] if target else words
            words[0] = Path(words[0]).name if words[0].endswith("/forge") else words[0]
            commands.append(Command(block.place, tuple(words), target, following.startswith("error: "), block.mark))
    return commands


def _split(line: str) -> list[list[str]]:
    """Splits a line of shell into the words of its commands, without comments and variables set for them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # an apostrophe of plain text: output, not a command
        return []
    commands: list[list[str]] = [[]]
    for token in tokens:
        if token in ("|", "&&", "||", ";", "&"):
            commands.append([])
        elif commands[-1] or not re.fullmatch(r"\w+=.*", token):
            commands[-1].append(token)
    return [words for words in commands if words]


def list_code(page: str) -> list[str]:
    """Lists the code that stands between backquotes in the text of a page."""
    return [" ".join(code[2].split()) for code in _CODE.finditer(_without_blocks(page))]


def list_links(page: str) -> list[str]:
    """Lists the targets of links and pictures."""
    text = _CODE.sub("", _without_blocks(page))
    return [first or second for first, second in _LINK.findall(text)]


def list_anchors(page: str) -> set[str]:
    """Lists the anchors of a page's headings, as code hosts make them, and those set by hand."""
    text = _without_blocks(page)
    anchors: set[str] = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in _HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = next(number for number in range(100) if f"{slug}-{number}".removesuffix("-0") not in anchors)
        anchors.add(f"{slug}-{number}".removesuffix("-0"))
    return anchors


def _without_blocks(page: str) -> str:
    lines, kept, opened = read_page(page).splitlines(), [], ""
    for line in lines:
        found = _FENCE.match(line)
        if not opened and found:
            opened = found[1]
        elif opened:
            opened = "" if line.strip() == opened else opened
        else:
            kept.append(line)
    return "\n".join(kept)
