"""What is shipped: stubs that tell the truth, types, a meeting that survives what earlier attempts left."""

from __future__ import annotations

import ast
import inspect
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import smdistributed_rs
from smdistributed_rs import _codes, _core
from torch_versions import TORCH

PACKAGE = Path(smdistributed_rs.__file__).parent


# ---- stubs


def stub() -> dict[str, ast.stmt]:
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    return {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}


def parameters(node: ast.FunctionDef) -> list[str]:
    return [a.arg for a in node.args.args if a.arg != "self"]


def real_parameters(thing: object) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name != "self"]


def test_the_stub_has_what_the_module_has() -> None:
    module = {n for n, v in vars(_core).items() if not n.startswith("_") and (callable(v) or inspect.isclass(v))}
    assert set(stub()) == module


@pytest.mark.parametrize("name", sorted(stub()))
def test_the_stub_has_the_right_signatures(name: str) -> None:
    node, real = stub()[name], getattr(_core, name)
    if isinstance(node, ast.FunctionDef):
        assert parameters(node) == real_parameters(real)
        return
    members = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    if made := members.pop("__init__", None):
        assert parameters(made) == real_parameters(real)
    members.pop("__call__", None)
    assert set(members) == {n for n in vars(real) if not n.startswith("_")}
    for member, declared in members.items():
        thing = getattr(real, member)
        if inspect.isdatadescriptor(thing):
            assert any(isinstance(d, ast.Name) and d.id == "property" for d in declared.decorator_list), member
        else:
            assert parameters(declared) == real_parameters(thing), member


def test_the_package_says_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_small_calls_go_the_shortest_way() -> None:
    """Where torch's options keep what they say is found out; a torch that keeps it elsewhere is noticed here."""
    import torch.distributed  # noqa: F401 (the backend is registered, and looks)

    assert _core.reads_options() == (TORCH >= (2, 11))


def test_tensors_are_read_without_asking_torch() -> None:
    """As above, of the place where tensors say that their memory holds the negatives of their elements."""
    from smdistributed_rs.backend import find_negatives

    assert find_negatives() == (TORCH >= (2, 11))


def test_every_public_thing_is_explained() -> None:
    for name in smdistributed_rs.__all__:
        thing = getattr(smdistributed_rs, name)
        if name != "__version__":
            assert thing.__doc__, name
    for cls in (smdistributed_rs.Communicator, smdistributed_rs.World):
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert member.__doc__ or getattr(cls.__mro__[1], name, None), f"{cls.__name__}.{name}"


def test_codes_are_the_native_ones() -> None:
    """A wrong code is refused by name: what is not refused is known there, and its size is checked with it."""
    world = _core.World.init([])  # its end would be the group's
    single = world.communicator()
    for dtype, code in _codes.DTYPES.items():
        size = {"bool": 1, "bfloat16": 2}.get(dtype) or int(dtype.lstrip("uintfloa")) // 8
        memory = bytearray(size * 3)
        address = _address(memory)
        single.run(_codes.BROADCAST, code, 0, 0, 3, (address, len(memory)), (address, len(memory)))
        with pytest.raises(smdistributed_rs.ArgumentError, match=dtype):
            single.run(_codes.BROADCAST, code, 0, 0, 4, (address, len(memory)), (address, len(memory)))
    for name, code in _codes.OPS.items():
        if name in ("band", "bor", "bxor"):
            with pytest.raises(smdistributed_rs.UnsupportedError, match=f"'{name}'.*float32"):
                single.run(_codes.ALL_REDUCE, _codes.DTYPES["float32"], code, 0, 0, (0, 0), (0, 0))
    with pytest.raises(smdistributed_rs.ArgumentError, match="known code"):
        single.run(99, 0, 0, 0, 0, (0, 0), (0, 0))


def _address(memory: bytearray) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


# ---- the meeting, in threads over torch's in-process store


def meet_all(
    store: object,
    size: int,
    limit: float,
    skip: set[int] = frozenset(),
    sizes: dict | None = None,
    late: dict | None = None,
) -> dict:
    """What each of `size` ranks gets from the meeting: its prefix or its error.

    store: one for all, or one each; late: seconds by which a rank comes later."""
    from smdistributed_rs._meeting import meet

    results: dict[int, object] = {}

    def one(rank: int) -> None:
        time.sleep((late or {}).get(rank, 0))
        try:
            mine = store[rank] if isinstance(store, list) else store
            results[rank] = meet(mine, rank, (sizes or {}).get(rank, size), limit, "g")[0]
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size) if rank not in skip]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.fixture
def store() -> object:
    import torch.distributed as dist

    return dist.HashStore()


def test_all_get_one_prefix_and_another_each_time(store: object) -> None:
    seen = set()
    for _ in range(5):
        results = meet_all(store, 4, 20)
        assert len(results) == 4
        assert len(set(results.values())) == 1, results
        seen |= set(results.values())
    assert len(seen) == 5


def test_what_dead_attempts_left_is_not_believed(store: object) -> None:
    # An attempt in which rank 2 never came.
    results = meet_all(store, 3, 0.5, skip={2})
    assert {type(r) for r in results.values()} == {smdistributed_rs.TimeoutError}
    assert all(r.missing == [2] for r in results.values()), results
    assert all((r.op, r.seq) == ("", 0) and r.waited >= 0.5 for r in results.values()), results
    # One whose rank 0 never came; and a writer that died between its number and its entry.
    results = meet_all(store, 3, 0.5, skip={0})
    assert all(r.missing == [0] for r in results.values()), results
    store.add("smddp/log", 1)
    # All come, again and again, though everything of the above is still there.
    for _ in range(3):
        results = meet_all(store, 3, 20)
        assert len(results) == 3
        assert len(set(map(str, results.values()))) == 1, results


def test_a_barrier_without_time_says_what_other_late_ones_do() -> None:
    from smdistributed_rs.monitored import monitored_barrier

    with pytest.raises(smdistributed_rs.TimeoutError, match="above 0") as caught:
        monitored_barrier(SimpleNamespace(rank=1, name="g"), 0, wait_all_ranks=False)
    error = caught.value
    assert (error.rank, error.group, error.op, error.seq) == (1, "g", "monitored_barrier", 0)
    assert (error.waited, error.missing) == (0, [])


@pytest.mark.parametrize("late", [{}, {1: 0.5}], ids=["together", "one late"])
def test_a_wrong_size_is_named_to_all(store: object, late: dict[int, float]) -> None:
    results = meet_all(store, 3, 20, sizes={2: 5}, late=late)
    assert len(results) == 3
    for error in results.values():
        assert isinstance(error, smdistributed_rs.BootstrapError), results
        assert "rank 0 was given 3, rank 2 was given 5" in str(error)


# ---- what a meeting leaves

STORES = ["HashStore", "FileStore", "TCPStore", "PrefixStore"]


def handles(kind: str, size: int, folder: Path) -> list:
    """One store, as each rank has it."""
    import torch.distributed as dist

    if kind == "FileStore":
        return [dist.FileStore(str(folder / "store")) for _ in range(size)]
    if kind == "TCPStore":
        served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return [served] + [dist.TCPStore("127.0.0.1", served.port, is_master=False) for _ in range(1, size)]
    store = dist.HashStore()
    return [dist.PrefixStore("a/b/", store) if kind == "PrefixStore" else store for _ in range(size)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", STORES)
def test_a_meeting_that_is_over_leaves_nothing(kind: str, size: int, tmp_path: Path) -> None:
    from smdistributed_rs._meeting import forget

    stores = handles(kind, size, tmp_path)
    before = stores[0].num_keys()
    for _ in range(3):
        results = meet_all(stores, size, 20)
        assert len(set(results.values())) == 1, results
        assert stores[0].num_keys() > before
        for rank in range(size):
            forget(stores[rank], rank, size, results[0])
        assert stores[0].num_keys() == before
