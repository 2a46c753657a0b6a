"""docs/clients.md from the JUnit reports in a folder: report.py FOLDER. Rows of groups that were not run stay."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/clients.md"
HEAD = "| client | what was done | result | date |\n| --- | --- | --- | --- |"
GROUPS = {
    "sagemaker": "SageMaker: the SDK and the training toolkit, on emulated hosts",
    "modeltrainer": "SageMaker's SDK from version 3 on: ModelTrainer's launchers, on emulated hosts",
    "frameworks": "Frameworks, 2 ranks on CPU",
    "ray": "Ray Train, 2 workers on CPU",
    "containers": "The image and the manifests in docker/, without Docker and a cluster",
    "slurm": "Slurm of one machine with two nodes",
}


ENVIRONMENTS = {"sagemaker": ["sdk", "toolkit"], "modeltrainer": ["modeltrainer", "toolkit"], "slurm": []}
"""of a group, where not its own"""


def versions(group: str) -> dict[str, str]:
    """Pinned packages of a group's environments."""
    files = [HERE / f"{name}.txt" for name in ENVIRONMENTS.get(group, [group])]
    lines = [line for file in files for line in file.read_text().splitlines()]
    pinned = (line.split("==") for line in lines if "==" in line)
    return {name.partition("[")[0]: version for name, version in pinned}


def client(group: str, text: str) -> tuple[str, str]:
    """(client and version, what was done) of a case's first line."""
    if group == "sagemaker":
        return "SDK {sagemaker}, toolkit {sagemaker-training}".format_map(versions(group)), text
    name, _, what = text.partition(": ")
    version = slurm_version() if group == "slurm" else versions(group).get(name, "")
    return f"{name} {version}".strip(), what


def slurm_version() -> str:
    try:
        return subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
    except FileNotFoundError:
        return "(not here)"


def rows(group: str, report: Path) -> list[str]:
    tree = ast.parse((HERE / f"case_{group}.py").read_text())
    texts = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        name, _, arguments = (case.get("name") or "").partition("[")
        parts = {part.tag: part.get("message", "") for part in case}
        result = "passed"
        if "failure" in parts or "error" in parts:
            result = f"**failed**: {cell(parts.get('failure', parts.get('error', '')))[:120]}"
        elif "skipped" in parts:
            result = f"not run: {cell(parts['skipped'])[:120]}"
        who, what = client(group, (texts.get(name) or name).splitlines()[0])
        variant = f" ({arguments.removesuffix(']')})" if arguments else ""
        found.append(f"| {who} | {cell(what)}{variant} | {result} | {date.today()} |")
    return found


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/").strip()


def before(group: str) -> list[str]:
    """The rows the page has."""
    if not PAGE.exists():
        return []
    section = PAGE.read_text().partition(f"## {GROUPS[group]}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ") and line not in HEAD.splitlines()]


def main() -> None:
    folder = Path(sys.argv[1])
    parts = [
        "# Clients",
        "",
        "<!-- Made by scripts/test-clients; do not edit by hand. -->",
        "",
        "Programs of others that start or use this backend, run for real by `./scripts/test-clients`: one row a case.",
        f"Versions are pinned in `tests/clients/*.txt`; torch is {version('torch')}. No GPU was used.",
    ]
    for group, title in GROUPS.items():
        report = folder / f"{group}.xml"
        found = rows(group, report) if report.exists() else before(group)
        if found:
            parts += ["", f"## {title}", "", HEAD, *found]
            print(title, HEAD, *found, sep="\n")
    parts += ["", (HERE / "notes.md").read_text().strip()]
    PAGE.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
