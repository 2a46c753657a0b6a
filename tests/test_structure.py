"""Files of a package or a crate import each other one way only: what two need of each other lies below both."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CRATES = sorted(path.parent.name for path in ROOT.glob("crates/*/src"))
PACKAGES = {
    "smdistributed_rs": "python/smdistributed_rs",
    "smddprun": "shim/src/smddprun",
    "smdistributed.dataparallel": "shim/src/smdistributed/dataparallel",
}

Graph = dict[str, set[str]]


def order(graph: Graph) -> list[str]:
    return list(graphlib.TopologicalSorter(graph).static_order())


# ---- Rust


def module_of(file: Path, src: Path) -> str:
    parts = list(file.relative_to(src).with_suffix("").parts)
    if parts[-1] in ("mod", "lib", "main"):
        parts.pop()
    return "::".join(parts)


def flat(tree: str) -> Iterator[str]:
    """The paths of a `use` with braces."""
    head, brace, rest = tree.partition("{")
    if not brace:
        yield tree.split(" as ")[0].strip()
        return
    depth, part = 0, ""
    for char in rest.rpartition("}")[0] + ",":
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            if part.strip():
                yield from (head.strip() + path for path in flat(part.strip()))
            part = ""
        else:
            part += char


def uses(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it hands the names on, path) of what a file imports, its tests apart."""
    product = text.partition("\n#[cfg(test)]\nmod ")[0]
    for public, tree in re.findall(r"^[ \t]*(pub(?:\([^)]*\))? )?use ([^;]+);", product, flags=re.MULTILINE):
        yield from ((bool(public), path) for path in flat(" ".join(tree.split())))


def absolute(path: str, module: str, modules: set[str]) -> str | None:
    """`path` from the crate's root, as `module` means it; None: of another crate."""
    first, _, rest = path.partition("::")
    here = module
    while first == "super":
        here = here.rpartition("::")[0]
        first, _, rest = rest.partition("::")
        if first != "super":
            return "::".join(filter(None, (here, first, rest)))
    if first in ("crate", "self"):
        return rest if first == "crate" else "::".join(filter(None, (module, rest)))
    inner = "::".join(filter(None, (module, path)))
    return inner if "::".join(filter(None, (module, first))) in modules else None


def rust_graph(src: Path) -> Graph:
    texts = {module_of(file, src): file.read_text() for file in src.rglob("*.rs") if "test" not in file.stem}
    modules = set(texts)
    handed_on: dict[str, str] = {}
    for module, text in texts.items():
        for public, path in uses(text):
            target = absolute(path, module, modules)
            if public and target is not None:
                handed_on["::".join(filter(None, (module, target.rpartition("::")[2])))] = target

    def home(path: str) -> str:
        """The file in which `path` is defined."""
        seen = set()
        while path in handed_on and path not in seen:
            seen.add(path)
            path = handed_on[path]
        while path not in modules:
            path = path.rpartition("::")[0]
        return path

    graph: Graph = {module: set() for module in modules}
    for module, text in texts.items():
        for public, path in uses(text):
            target = absolute(path, module, modules)
            if target is not None and not public:
                graph[module] |= {home(target)} - {module}
    return graph


@pytest.mark.parametrize("crate", CRATES)
def test_files_of_a_crate_import_one_way(crate: str) -> None:
    graph = rust_graph(ROOT / "crates" / crate / "src")
    assert set(order(graph)) == set(graph)


def test_imports_of_rust_are_followed(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "lib.rs").write_text("mod low;\nmod plan;\npub use plan::Plan;\n")
    (tmp_path / "plan/mod.rs").write_text("mod data;\npub use data::{Plan, Step as Move};\n")
    (tmp_path / "plan/data.rs").write_text("use std::fmt;\nuse super::super::low::{self, deep::{A, B}};\n")
    (tmp_path / "low.rs").write_text("pub(crate) use other::X;\n#[cfg(test)]\nmod tests {\n    use crate::Plan;\n}\n")
    graph = rust_graph(tmp_path)
    assert graph == {"": set(), "plan": set(), "plan::data": {"low"}, "low": set()}
    (tmp_path / "low.rs").write_text("use crate::{fmt::Y, Plan};\n")
    assert rust_graph(tmp_path)["low"] >= {"plan::data"}
    with pytest.raises(graphlib.CycleError):
        order(rust_graph(tmp_path))


# ---- Python


def python_graph(name: str, folder: Path) -> Graph:
    """Imports anywhere in a file count, those for types too. An `__init__` is named as its folder."""
    parts = {
        file: (name, *file.relative_to(folder).with_suffix("").parts)
        for file in folder.rglob("*.py*")
        if file.suffix in (".py", ".pyi")
    }
    modules = {".".join(path).removesuffix(".__init__"): file for file, path in parts.items()}
    graph: Graph = {}
    for module, file in modules.items():
        package = parts[file][:-1]
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else ()
                base = ".".join([*start, *filter(None, [node.module])])
                inner = [f"{base}.{alias.name}" for alias in node.names]
                wanted.update(path if path in modules else base for path in inner)
        graph[module] = {path for path in wanted if path in modules and path != module}
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_files_of_a_package_import_one_way(package: str) -> None:
    graph = python_graph(package, ROOT / PACKAGES[package])
    assert any(graph.values())
    assert set(order(graph)) == set(graph)


def test_imports_of_python_are_followed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/__init__.py").write_text("from ..a import A\n")
    (tmp_path / "a.py").write_text("import os\nfrom .b import B\n")
    (tmp_path / "b.py").write_text("import json\n")
    assert python_graph("p", tmp_path) == {"p.a": {"p.b"}, "p.b": set(), "p.inner": {"p.a"}}
    for circle in ("def late():\n    from . import a\n", "import p.inner\n", "from p.a import A\n"):
        (tmp_path / "b.py").write_text(circle)
        with pytest.raises(graphlib.CycleError):
            order(python_graph("p", tmp_path))
