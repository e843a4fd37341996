"""Tests of wording: documents, docstrings and messages use the field's terms, and mended phrases do not come back."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "glit_models", "search", "export", "benchmarks", ".github")
# Phrase (a regular expression, in any case): what to write instead.
BANNED = {
    r"\bpictures?\b": "image",
    r"\bof chance\b": "random, or at random",
    r"\bwithout chance\b": "deterministic",
    r"\bdearest\b": "most expensive",
    r"\bfellows\b": "the other files",
    r"\bin silence\b": "without an error, or without a message",
    r"(^|\. )\W*(it )?knows (nothing of|\w+, not|\w+ only|\w+ and \w+[;,.])": "what the module does",
    r"\bis for others\b|\bare for others\b|\bothers' business\b": "who does it",
    r"\bwhat (a|an|the) \w+ is, is\b": "the sentence in natural order",
    r"\bis \S+'s to know\b|\bfor the caller to know\b": "who defines it",
    r"\bflops?\b(?!/s)": "multiply-adds, or MACs",
    r"\ba clear word\b|\bwithout a word\b": "an error, or without an error",
    r"\bin the mean\b": "on average",
    r"\bof one's own\b": "custom",
    r"\b(go(es)?|going) on (from (here|there)|where it (was )?stopped)\b": "resume",
    r"\bthe same command( again)? goes on\b": "the same command resumes",
    r"\bthereof\b|\bwherein\b|\bheretofore\b|\bnaught\b|\blest\b|\bbetwixt\b": "plain words",
    r"\b(is|are) come by\b|\b(can|cannot) be had\b": "available, or computed",
    r"\bthat which\b|\bof whatever\b": "the thing's name",
    r"\bfor want of\b|\bif need be\b|\bas if not\b": "without, if necessary, unchanged",
    r"\bpromises of\b": "tests of",
    r"\bwhat (stood|stands) (there|at)\b": "an existing file",
    r"\btrained individually\b": "stand-alone",
}
# The same for all files but documents, in which some of these are still to be mended.
BANNED_IN_CODE = {
    r"\bin the mean\b": "on average",
    r"\bmeanwhile\b": "in the meantime",
    r"\banew\b": "again, or new",
    r"\bsaves? and leaves?\b": "save and exit",
    r"\bsays? so\b": "what is printed or raised",
    r"\bunless (given|told)\b": "(default: ...)",
    r"\bof (one's|your) own\b": "custom, or user-defined",
    r"\bgone on with\b|\bgo(es)? on from\b(?! here)": "resume from",
    r"\b(a|on) \w+ that cannot be[.;:]": "an invalid value",
}


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of each file that people read."""
    paths = [*ROOT.glob("*.md"), ROOT / "hubconf.py", ROOT / "Makefile", ROOT / "pyproject.toml"]
    for folder in FOLDERS:
        paths += (path for path in (ROOT / folder).rglob("*") if path.suffix in {".md", ".py", ".yaml", ".yml"})
    for path in paths:
        if "__pycache__" not in path.parts:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_no_text_has_a_phrase_that_was_mended() -> None:
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()!r}; write {better}"
        for name, text in texts()
        for phrase, better in (BANNED if name.endswith(".md") else BANNED | BANNED_IN_CODE).items()
        for match in re.finditer(phrase, text, re.IGNORECASE | re.MULTILINE)
    ]
    assert found == []


def test_the_phrases_are_found_where_they_stand() -> None:
    """Else the test above would hold nothing."""
    text = "A picture of chance.\nIt knows graphs, not models. What a slice is, is known. It goes on from here."
    assert sum(bool(re.search(phrase, text, re.IGNORECASE | re.MULTILINE)) for phrase in BANNED) == 5
