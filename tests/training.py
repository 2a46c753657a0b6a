"""One small training, by one process or by several: its model, its batches, and what came of it as plain data."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

BATCH, STEPS = 16, 4
SHAPES = {"1 node x 2": [0, 0], "2 nodes x 2": [0, 0, 1, 1]}

Data = tuple[torch.Tensor, torch.Tensor]
Outcome = dict[str, object]
"""`losses` of the whole batches and, at the end, `state`: the model's tensors by name"""


class Net(torch.nn.Module):
    """The last layer has 5 rows, which neither 2 nor 4 ranks share evenly."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 32)
        self.norm = torch.nn.BatchNorm1d(32) if norm else torch.nn.Identity()
        self.middle = torch.nn.Linear(32, 32)
        self.last = torch.nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.norm(self.first(x))))))


def net(norm: bool = False) -> Net:
    """The same model in every process."""
    torch.manual_seed(1)
    return Net(norm)


def sgd(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    # It divides by the size of gradients: the default eps would magnify the rounding of tiny ones.
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-4)


ADAM = 1e-4
"""how far Adam's results may differ, which still magnifies"""


def batch(step: int) -> Data:
    """The whole batch of a step."""
    data = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 12, generator=data)
    return x, x[:, :5].argmax(1)


def share(whole: Data, rank: int, size: int) -> Data:
    part = slice(BATCH * rank // size, BATCH * (rank + 1) // size)
    return whole[0][part], whole[1][part]


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], data: Data) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(data[0]), data[1])


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data, clip: float = 0) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, data)
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int] = range(STEPS),
    group: dist.ProcessGroup | None = None,
    clip: float = 0,
) -> list[float]:
    """Trains on this rank's share of each batch; the losses are those of the whole batches."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return [mean(step(model, optimizer, share(batch(n), rank, size), clip), group) for n in steps]


def mean(loss: torch.Tensor, group: dist.ProcessGroup | None = None) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    return total.item() / dist.get_world_size(group)


def alone(
    make: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer] = sgd, steps: int = STEPS, clip: float = 0
) -> Outcome:
    """What one process that trains on whole batches arrives at."""
    model = net()
    optimizer = make(model.parameters())
    return outcome([step(model, optimizer, batch(n), clip).item() for n in range(steps)], model)


def outcome(losses: list[float], model: torch.nn.Module) -> Outcome:
    return {"losses": losses, "state": state(model.state_dict())}


def state(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    """Tensors as lists; those spread over ranks in full, so that every rank must call."""
    full = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in tensors.items()}
    return {k: t.tolist() for k, t in full.items()}


# ---- in ranks


def start(backend: str = "smddp") -> None:
    import smdistributed_rs  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))


def run_cases(cases: dict[str, Callable[[], object]], backend: str = "smddp") -> dict[str, object]:
    """What each case returns, or the error it ended with: several of them share the cost of one launch."""
    start(backend)
    found: dict[str, object] = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    dist.barrier()
    dist.destroy_process_group()
    return found


# ---- in tests


def check(found: list[object], expected: object, rel: float = 1e-5) -> None:
    """Every rank found the same to the bit, and it is `expected` up to the order of additions."""
    for one in found:
        assert not (isinstance(one, dict) and "error" in one), one["error"]
        assert one == found[0]
    wanted, got = dict(leaves(expected)), dict(leaves(found[0]))
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        # Values near zero are sums in which larger ones cancel.
        assert got[path] == pytest.approx(value, rel=rel, abs=rel / 10), f"{path}: {got[path]}, not {value}"


def leaves(tree: object, path: str = "") -> Iterable[tuple[str, object]]:
    """The lists of numbers of nested data, by path."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if _nested(tree) else None
    if parts is None:
        yield path, tree
        return
    for key, part in parts:
        yield from leaves(part, f"{path}/{key}")


def _nested(tree: object) -> bool:
    return isinstance(tree, list) and any(isinstance(part, (list, dict)) for part in tree)
