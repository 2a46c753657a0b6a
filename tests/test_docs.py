"""The documentation against the code: links lead somewhere, and the pages of calls and of errors say what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import smdistributed_rs
from smdistributed_rs import errors, shared

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(p for d in ("docs", "shim", "docker", "tests") for p in (ROOT / d).rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
API = (ROOT / "docs/api.md").read_text()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    heads = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def section(name: str) -> str:
    return API.split(f"\n## {name}\n")[1].split("\n## ")[0]


def signature(thing: object) -> str:
    found = inspect.signature(thing)
    plain = [p.replace(annotation=p.empty) for name, p in found.parameters.items() if name != "self"]
    kinds = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind == p.POSITIONAL_ONLY else p for p in plain]
    return str(found.replace(parameters=kinds, return_annotation=found.empty))


def members(owner: object, names: list[str]) -> set[str]:
    static = {name: inspect.getattr_static(owner, name) for name in names}
    return {name if isinstance(it, property) else name + signature(it) for name, it in static.items()}


@pytest.mark.parametrize("name", ["Communicator", "World", "Handle", "shared"])
def test_the_api_page_has_every_member_as_it_is(name: str) -> None:
    if name == "shared":
        owner, names = shared, list(shared.__all__)
    else:
        owner = getattr(smdistributed_rs, name)
        above = {n for base in owner.__mro__[1:] if base is not object for n in vars(base)}
        names = [n for n in vars(owner) if not n.startswith("_") and n not in above]
    cells = re.findall(r"(?m)^\| (`.+?`) \|", section(name))
    assert {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)} == members(owner, names)


def test_the_page_of_failures_has_every_error_with_its_attributes() -> None:
    page = (ROOT / "docs/how-to/handle-failures.md").read_text()
    said = {}
    for names, attributes in re.findall(r"(?m)^\| (`\w+Error`) \|[^|]*\|([^|]*)\|", page):
        said[names.strip("`")] = re.findall(r"`(\w+)`", attributes)
    has = {name: list(inspect.get_annotations(getattr(errors, name))) for name in errors.__all__}
    del has["SmddpError"]
    assert said == has
