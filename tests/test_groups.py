"""Groups made in every way torch knows, and what torch itself looks at in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

import conftest
from torch_versions import needs

SHAPES = {"1 node x 4": [0, 0, 0, 0], "2 nodes x 2": [0, 0, 1, 1]}


def start(backend: str = "smddp", **options: object) -> None:
    import torch
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group(backend, **options)


def total(group: object) -> float:
    """The sum over a group of 1 + global rank."""
    import torch
    import torch.distributed as dist

    tensor = torch.full((1000,), 1.0 + dist.get_rank())
    dist.all_reduce(tensor, group=group)
    assert bool((tensor == tensor[0]).all())
    return tensor[0].item()


# ---- splitting


def split() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    # Torch takes the device of a group that is to be split from here.
    start(device_id=torch.device("cpu:0"))
    found: dict[str, object] = {}
    halves = dist.split_group(split_ranks=[[0, 2], [3, 1]], group_desc="halves")
    found["halves"] = total(halves)
    found["ranks"] = dist.get_process_group_ranks(halves)
    found["name"] = halves.group_desc
    found["again"] = total(dist.split_group(halves, [[0], [1]]))
    most = dist.split_group(split_ranks=[[1, 2, 3]])
    found["most"] = None if most is None or most is dist.GroupMember.NON_GROUP_MEMBER else total(most)
    found["world"] = total(None)
    dist.destroy_process_group(halves)
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.replace(" ", ""))
def test_a_group_can_be_split(shape: str) -> None:
    reports = conftest.run(split, 4, nodes=SHAPES[shape]).check().reports
    for rank, report in enumerate(reports):
        assert report["halves"] == (4.0 if rank in (0, 2) else 6.0)
        assert report["ranks"] == ([0, 2] if rank in (0, 2) else [3, 1])
        assert report["name"] == "halves"
        assert report["again"] == rank + 1.0
        assert report["most"] == (9.0 if rank else None)
        assert report["world"] == 10.0


# ---- meshes and other ways of making many groups


def meshes() -> dict[str, object]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    start()
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    found = {
        "line": total(line.get_group()),
        "row": total(square["row"].get_group()),
        "column": total(square.get_group("column")),
        "flat": total(square._flatten().get_group()) if hasattr(square, "_flatten") else 10.0,
    }
    mine, _ = dist.new_subgroups_by_enumeration([[0, 3], [1, 2]])
    found["enumerated"] = total(mine)
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.replace(" ", ""))
def test_meshes(shape: str) -> None:
    for rank, report in enumerate(conftest.run(meshes, 4, nodes=SHAPES[shape]).check().reports):
        assert report["line"] == report["flat"] == 10.0
        assert report["column"] == (3.0 if rank < 2 else 7.0)
        assert report["row"] == (4.0 if rank % 2 == 0 else 6.0)
        assert report["enumerated"] == 5.0


# ---- groups bound to a device


def bound() -> dict[str, object]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    here = torch.device("cpu:0")
    start(device_id=here)
    world = dist.group.WORLD
    # Rank 2 is no member, which torch tells its backend.
    two = dist.new_group([1, 0])
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("all",))
    part = dist.split_group(split_ranks=[[0, 2], [1]])
    groups = [world, mesh.get_group(), part] + ([two] if dist.get_rank() < 2 else [])
    found = {
        "groups": [str(group.bound_device_id) for group in groups],
        "backends": [str(group._get_backend(here).bound_device_id) for group in groups],
        "plain": [str(group._plain.bound_device_id) for group in groups if hasattr(group, "_plain")],
        "totals": [total(group) for group in groups],
    }
    dist.barrier()
    dist.destroy_process_group()
    return found


@needs("python backends")
@pytest.mark.parametrize("carrier", ["group", "backend"])
def test_a_group_knows_the_device_it_is_bound_to(carrier: str) -> None:
    reports = conftest.run(bound, 3, env={"SMDDP_TORCH_GROUP": carrier}).check().reports
    for rank, report in enumerate(reports):
        assert report["totals"] == [6.0, 6.0, 2.0 if rank == 1 else 4.0] + ([3.0] if rank < 2 else [])
        for what in ("groups", "backends", "plain"):
            assert set(report[what]) <= {"cpu:0"}, report
        assert len(report["plain"]) == (len(report["totals"]) if carrier == "backend" else 0)


# ---- several backends in one group


def mixed(backend: str) -> dict[str, object]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    start(backend)
    world = dist.group.WORLD
    found = {"total": total(None), "kind": type(world).__name__}
    found["backends"] = {d.type: world._get_backend(d).name() for d in world._device_types}
    work = dist.all_reduce(torch.ones(1), async_op=True)
    work.wait()
    found["completed"] = work.is_completed()
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, dist.get_rank())
    found["objects"] = every
    found["sub"] = total(dist.new_group([0, 1]))
    world.set_timeout(timedelta(seconds=50))
    found["limits"] = [world._get_backend(d).options._timeout.total_seconds() for d in world._device_types]
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("backend", "backends"),
    [
        ("cpu:smddp,cuda:gloo", {"cpu": "smddp", "cuda": "gloo"}),
        ("cpu:gloo,cuda:smddp", {"cpu": "gloo", "cuda": "smddp"}),
        ("cpu:smddp,cuda:smddp", {"cpu": "smddp", "cuda": "smddp"}),
    ],
)
@pytest.mark.parametrize("carrier", ["group", "backend"])
def test_others_may_serve_other_devices(backend: str, backends: dict[str, str], carrier: str) -> None:
    ranks = conftest.run(mixed, 2, env={"SMDDP_TORCH_GROUP": carrier}, backend=backend).check()
    for report in ranks.reports:
        assert report["total"] == report["sub"] == 3.0
        assert report["backends"] == backends
        assert report["completed"]
        assert report["objects"] == [0, 1]
        assert report["limits"] == [50.0] * len(backends)
        hooked = carrier == "backend"
        several = len(set(backends.values())) > 1
        expected = "HookedProcessGroup" if hooked else "MixedProcessGroup" if several else "SmddpProcessGroup"
        assert report["kind"] == expected


def beside_unknown(backend: str, makes_nccl: bool) -> dict[str, str]:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg

    if makes_nccl:
        # As torch from 2.15 on: what "nccl" names calls itself otherwise.
        dist.Backend._plugins["NCCL"] = dist.Backend._BackendPlugin(fake_pg._create_fake_pg, True)
    start(backend)
    assert total(None) == 3.0
    world = dist.group.WORLD
    found = {d.type: world._get_backend(d).name() for d in world._device_types}
    assert type(world._get_backend(torch.device("cuda"))) is not type(world._get_backend(torch.device("cpu")))
    dist.destroy_process_group()
    return found


@needs("python backends")
@pytest.mark.parametrize("carrier", ["group", "backend"])
@pytest.mark.parametrize(("backend", "makes_nccl"), [("cpu:smddp,cuda:fake", False), ("cpu:smddp,cuda:nccl", True)])
def test_backends_torch_knows_no_type_of_stay_apart(backend: str, makes_nccl: bool, carrier: str) -> None:
    env = {"SMDDP_TORCH_GROUP": carrier}
    for report in conftest.run(beside_unknown, 2, env=env, backend=backend, makes_nccl=makes_nccl).check().reports:
        assert report == {"cpu": "smddp", "cuda": "fake"}


def test_each_backend_has_a_type_of_its_own() -> None:
    from torch.distributed import ProcessGroup

    from smdistributed_rs._new_group import NewGroup, Other, backends_of_others
    from smdistributed_rs.process_group import _in_slots_of_their_own

    kinds, one, two = ProcessGroup.BackendType, object(), object()
    others = {"cuda": Other(kinds.CUSTOM, one), "xpu": Other(kinds.CUSTOM, two), "mps": Other(kinds.CUSTOM, one)}
    registered = _in_slots_of_their_own(others, [kinds.CUSTOM])
    assert [(device, backend) for device, _, backend in registered] == [("cuda", one), ("xpu", two), ("mps", one)]
    first, second, again = (kind for _, kind, _ in registered)
    assert len({str(kind) for kind in (kinds.CUSTOM, kinds.UNDEFINED, first, second)}) == 4
    assert first == again
    assert _in_slots_of_their_own({"cuda": Other(kinds.NCCL, one)}, [kinds.CUSTOM]) == [("cuda", kinds.NCCL, one)]
    made: Any = SimpleNamespace(_device_types=[torch.device("cuda")], _get_backend=lambda _: one)
    assert backends_of_others(NewGroup(["cpu"], {"cuda": "nccl"}, made), None) == {"cuda": Other(kinds.NCCL, one)}


def split_of_mixed(backend: str) -> dict[str, object]:
    import inspect

    import torch
    import torch.distributed as dist

    start(backend)
    found: dict[str, object] = {}
    wanted = [None, *backend.split(",")] if "backend" in inspect.signature(dist.split_group).parameters else [None]
    for only in wanted:
        how = {} if only is None else {"backend": only}
        # Rank 2 is in none, and calls all the same.
        child = dist.split_group(split_ranks=[[1, 0]], **how)
        if dist.get_rank() == 2:
            continue
        devices = sorted(d.type for d in child._device_types)
        found[str(only)] = {
            "backends": {d: child._get_backend(torch.device(d)).name() for d in devices},
            "ranks": dist.get_process_group_ranks(child),
            "rank": [child.rank(), *(child._get_backend(torch.device(d)).rank() for d in devices)],
            "total": total(child) if "cpu" in devices else None,
            "kind": type(child).__name__,
            "limit": [child._get_backend(torch.device(d)).options._timeout.total_seconds() for d in devices],
        }
        dist.destroy_process_group(child)
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("carrier", ["group", "backend"])
@pytest.mark.parametrize("backend", ["cpu:smddp,cuda:gloo", "cpu:gloo,cuda:smddp"])
def test_a_split_group_has_its_parents_backends(backend: str, carrier: str) -> None:
    reports = conftest.run(split_of_mixed, 3, env={"SMDDP_TORCH_GROUP": carrier}, backend=backend).check().reports
    assert reports.pop() == {}
    for rank, report in enumerate(reports):
        for only, found in report.items():
            named = backend if only == "None" else only
            backends = dict(one.split(":") for one in named.split(","))
            assert found["backends"] == backends
            assert found["ranks"] == [1, 0]
            assert found["rank"] == [1 - rank] * (1 + len(backends))
            assert found["total"] == (3.0 if "cpu" in backends else None)
            assert found["limit"] == [1800.0] * len(backends)
            kinds = {"MixedProcessGroup", "HookedProcessGroup"} if only == "None" else {found["kind"]}
            assert found["kind"] in kinds


def test_a_backend_that_cannot_be_split_says_so() -> None:
    from smdistributed_rs.errors import BootstrapError
    from smdistributed_rs.process_group import _check_splits

    with pytest.raises(BootstrapError, match="'cpu:mpi' cannot be split"):
        _check_splits("cpu", SimpleNamespace(name=lambda: "mpi", supports_splitting=False))


# ---- methods as torch's own are overloaded


def overloads(backend: str) -> dict[str, object]:
    """What every way to call a group's methods leaves in its tensors."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    start(backend)
    g, me, n, op = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), dist.ReduceOp
    limit, at_root = timedelta(seconds=20), dist.get_rank() == 1

    def x(salt: int = 0) -> torch.Tensor:
        return torch.arange(4.0) + 10 * me + 100 * salt

    def xs() -> list[torch.Tensor]:
        return [x(i) for i in range(n)]

    calls = {
        "broadcast": lambda t, _: g.broadcast(t, 1),
        "broadcast, by name": lambda t, _: g.broadcast(t, root=1),
        "broadcast, limit": lambda t, _: g.broadcast(t, 1, limit),
        "broadcast, defaults": lambda t, _: g.broadcast([t]),
        "allreduce": lambda t, _: g.allreduce(t),
        "allreduce, op": lambda t, _: g.allreduce(t, op.MAX, limit),
        "allreduce, op by name": lambda t, _: g.allreduce(t, op=op.MAX),
        "allreduce, list and op": lambda t, _: g.allreduce([t], op=op.MAX),
        "allreduce, defaults": lambda t, _: g.allreduce([t]),
        "allgather": lambda t, ts: g.allgather(ts, t),
        "allgather, limit": lambda t, ts: g.allgather(ts, t, limit),
        "allgather, defaults": lambda t, ts: g.allgather([ts], [t]),
        "all_gather_single": lambda t, ts: g._allgather_base(ts[0], t[:2]),
        "gather": lambda t, ts: g.gather(ts if at_root else [], t, 1),
        "gather, limit": lambda t, ts: g.gather(ts if at_root else [], t, 1, limit),
        "gather, defaults": lambda t, ts: g.gather([ts] if me == 0 else [], [t]),
        "scatter": lambda t, ts: g.scatter(t, ts if at_root else [], 1),
        "scatter, limit": lambda t, ts: g.scatter(t, ts if at_root else [], root=1, timeout=limit),
        "scatter, defaults": lambda t, ts: g.scatter([t], [ts] if me == 0 else []),
        "reduce_scatter": lambda t, ts: g.reduce_scatter(t, ts),
        "reduce_scatter, op": lambda t, ts: g.reduce_scatter(t, ts, op.MAX, limit),
        "reduce_scatter, op by name": lambda t, ts: g.reduce_scatter(t, ts, op=op.MAX),
        "reduce_scatter, defaults": lambda t, ts: g.reduce_scatter([t], [ts]),
        "alltoall, defaults": lambda t, ts: g.alltoall(ts, xs()),
        "alltoall_base, defaults": lambda t, ts: g.alltoall_base(t, ts[0], [], []),
        "barrier": lambda t, ts: g.barrier(timeout=limit),
    }
    found: dict[str, object] = {}
    for name, call in calls.items():
        t, ts = x(), xs()
        call(t, ts).wait()
        found[name] = [t.tolist(), [each.tolist() for each in ts]]
    for how in ((1,), (1, op.MAX), (1, op.MAX, limit)):
        t = x()
        g.reduce(t, *how).wait()
        # Gloo leaves what it likes with the others.
        found[f"reduce, {len(how)}"] = at_root and t.tolist()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("backend", "carrier"), [("smddp", "group"), ("smddp", "backend"), ("cpu:smddp,cuda:gloo", "group")]
)
def test_methods_may_be_called_as_those_of_torchs_own_group(backend: str, carrier: str) -> None:
    expected = conftest.run(overloads, 2, backend="gloo").check().reports
    given = conftest.run(overloads, 2, env={"SMDDP_TORCH_GROUP": carrier}, backend=backend).check().reports
    assert given == expected


# ---- what torch looks at


def looked_at() -> dict[str, object]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    start(timeout=timedelta(seconds=40))
    world = dist.group.WORLD
    found: dict[str, object] = {"backend": dist.get_backend(), "name": world.name(), "size": world.size()}
    found["timeout"] = world._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    distributed_c10d._set_pg_timeout(timedelta(seconds=50), world)
    found["changed"] = world._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    before = world._get_sequence_number_for_group()
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    found["calls"] = world._get_sequence_number_for_group() - before
    dist.barrier(device_ids=[0])
    dist.destroy_process_group()
    return found


def test_names_limits_and_numbers() -> None:
    for report in conftest.run(looked_at, 2).check().reports:
        assert report == {
            "backend": "smddp", "name": "smddp", "size": 2, "timeout": 40.0, "changed": 50.0, "calls": 3,
        }  # fmt: skip


def profiled() -> list[dict[str, object]]:
    import torch
    import torch.distributed as dist

    start()
    rank = dist.get_rank()
    small, strided = torch.ones(6), torch.ones(4, 4).t()
    with torch.profiler.profile(record_shapes=True) as profile:
        dist.all_reduce(small)
        dist.all_reduce(strided)
        dist.all_gather_into_tensor(torch.empty(12), small)
        dist.broadcast(small, src=0)
        work = dist.all_reduce(small, dist.ReduceOp.MAX, async_op=True)
        work.wait()
        dist.send(small, 1) if rank == 0 else dist.recv(small, 0)
        dist.barrier()
    dist.all_reduce(small)
    dist.destroy_process_group()
    events = [e for e in profile.events() if e.name.startswith("smddp:")]
    return [{"name": e.name, "shapes": [list(s) for s in e.input_shapes], "async": e.is_async} for e in events]


def test_a_profile_shows_every_call() -> None:
    for rank, events in enumerate(conftest.run(profiled, 2).check().reports):
        message = "smddp:send" if rank == 0 else "smddp:recv"
        assert sorted((e["name"], e["shapes"]) for e in events) == sorted(
            [
                ("smddp:all_reduce", [[6]]),
                ("smddp:all_reduce", [[4, 4]]),
                ("smddp:all_gather", [[6]]),
                ("smddp:broadcast", [[6]]),
                ("smddp:all_reduce", [[6]]),
                (message, [[6]]),
                ("smddp:barrier", []),
            ]
        )
        assert all(e["async"] for e in events)


def recorded() -> list[dict[str, object]]:
    import json

    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import _dump_fr_trace_json

    start()
    dist.all_reduce(torch.ones(5))
    dist.broadcast(torch.ones(3), src=0)
    entries = json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False, backend="smddp"))["entries"]
    dist.destroy_process_group()
    return [{"name": e["profiling_name"], "sizes": e["input_sizes"]} for e in entries]


def test_the_flight_recorder_sees_calls_when_asked_for() -> None:
    pytest.importorskip("torch")
    import torch._C._distributed_c10d as c10d

    if not hasattr(c10d, "FlightRecorderHook"):
        pytest.skip("this torch has no recorder for backends written in Python")
    for entries in conftest.run(recorded, 2, env={"TORCH_FR_BUFFER_SIZE": "100"}).check().reports:
        sizes = [e["sizes"] for e in entries]
        assert [[5]] in sizes, entries
        assert [[3]] in sizes, entries


def hooked() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    start()
    world, seen = dist.group.WORLD, []
    try:
        world.register_pre_hook(7, lambda _: seen.append("pre"))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    else:
        world.register_post_hook(8, lambda _: seen.append("post"))
        dist.all_reduce(torch.ones(1))
        found = {"seen": list(seen)}
        world.unregister_pre_hook(7)
        world.unregister_post_hook(8)
        dist.all_reduce(torch.ones(1))
        found["later"] = seen[len(found["seen"]) :]
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("carrier", ["group", "backend"])
def test_hooks_of_a_group_see_calls_or_are_refused(carrier: str) -> None:
    from torch.distributed import ProcessGroup

    if not hasattr(ProcessGroup, "register_pre_hook"):
        pytest.skip("groups of this torch have no hooks")
    for report in conftest.run(hooked, 2, env={"SMDDP_TORCH_GROUP": carrier}).check().reports:
        if carrier == "backend":
            assert report == {"seen": ["pre", "post"], "later": []}
        else:
            assert report["error"].startswith("UnsupportedError: register_pre_hook: ")
            assert "SMDDP_TORCH_GROUP=backend" in report["error"]


# ---- what groups leave in the store


def come_and_go() -> dict[str, object]:
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import PrefixStore

    from smdistributed_rs import backend

    start()
    rank, members, limit = dist.get_rank(), list(range(dist.get_world_size())), timedelta(seconds=30)
    store = dist.distributed_c10d._get_default_store()
    found = []
    for _ in range(2):
        for i in range(25):
            # The second time under the same names.
            seat = backend._connect(PrefixStore(f"of-a-test/{i}/", store), rank, len(members), limit, f"{i}", members)
            seat.communicator.shutdown()
        dist.barrier()
        found.append(store.num_keys())
        dist.barrier()
    # What torch itself leaves for each group is not ours.
    for _ in range(200):
        dist.destroy_process_group(dist.new_group())
    dist.barrier()
    found.append(store.num_keys())
    dist.barrier()
    dist.destroy_process_group()
    return {"keys": found}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.replace(" ", ""))
def test_groups_leave_nothing_in_the_store(shape: str) -> None:
    for report in conftest.run(come_and_go, 4, nodes=SHAPES[shape], limit=90).check().reports:
        first, second, many = report["keys"]
        assert first == second < 30, report
        assert many - second <= 3 * 200, report


# ---- what ends the making of a group


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", ["add", "set", "get"])
def test_an_interrupt_while_a_group_is_made_stays_one(call: str, interrupt: type[BaseException]) -> None:
    from smdistributed_rs import _core, _meeting

    def stop(*_: object) -> None:
        raise interrupt("enough")

    store: Any = SimpleNamespace(set=lambda *_: None, add=lambda *_: 1, wait=lambda *_: None, get=lambda *_: b"")
    setattr(store, call, stop)
    recorder = _meeting.Recorder(store)
    with pytest.raises(interrupt, match="enough"):
        _core.Communicator.connect(recorder, 0, 2, "stopped", "scope", 5.0, [])


# ---- the current CUDA device


def devices_chosen(used_before: bool) -> dict[str, object]:
    """What was asked of CUDA when it starts, with 2 devices here."""
    import torch
    import torch.distributed as dist

    at_start, chosen = [], []
    torch.cuda._lazy_call = lambda call: at_start.append(call)
    torch.cuda.is_initialized = lambda: used_before
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = chosen.append
    start()
    dist.new_group([0, 1])
    before = list(chosen)
    for call in at_start:
        call()
    dist.destroy_process_group()
    return {"before": before, "at start": chosen}


@pytest.mark.parametrize("launcher", ["names local ranks", "does not"])
def test_cuda_starts_on_the_local_ranks_device(launcher: str) -> None:
    env = {} if launcher == "names local ranks" else {"LOCAL_RANK": ""}
    reports = conftest.run(devices_chosen, 4, used_before=False, nodes=[0, 0, 0, 1], env=env).check().reports
    assert reports == [{"before": [], "at start": [device]} for device in (0, 1, 0, 0)]


def test_who_used_cuda_before_has_chosen_a_device() -> None:
    reports = conftest.run(devices_chosen, 2, used_before=True).check().reports
    assert reports == [{"before": [], "at start": []}] * 2


# ---- the communicators of the CUDA side


def beside() -> dict[str, object]:
    import contextlib
    import threading
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from smdistributed_rs import _core, errors
    from smdistributed_rs._codes import BARRIER, DTYPES

    start()
    world: Any = dist.group.WORLD
    has_own, rail = _core.DeviceGroup.wanted(world._seat.communicator)
    found: dict[str, object] = {"own": has_own, "rail": rail}
    met = [world._cuda._met("cuda", [0, 1, 2, 3])] if has_own else []
    met += [world._cuda._met(f"rail{rail[0]}", rail)] if rail else []
    found["sizes"] = [one.size for one in met]
    found["named as the group"] = [one.name == world._seat.communicator.name for one in met]
    for one in met:
        # Some ranks have the one's call first, some the other's.
        call = (BARRIER, DTYPES["uint8"], 0, 0, 0, (0, 0), (0, 0))
        other = threading.Thread(target=one.run, args=call)
        if dist.get_rank() % 2:
            other.start()
        work = dist.all_reduce(torch.ones(3), async_op=True)
        if not other.is_alive() and not dist.get_rank() % 2:
            other.start()
        other.join(30)
        assert not other.is_alive()
        work.wait()
    world.set_timeout(timedelta(seconds=50))
    found["limits"] = {one.timeout for one in met} <= {50.0}
    # Rank 0 may be out of it, and abort, before the others are.
    with contextlib.suppress(errors.AbortedError):
        dist.barrier()
    if dist.get_rank() == 0:
        world.abort()
    # Of a rail without rank 0 nobody hears of it.
    met = [one for one in met if one.size == 4]
    for one in met:
        with contextlib.suppress(errors.AbortedError):
            while one.failure() is None:
                one.run(BARRIER, DTYPES["uint8"], 0, 0, 0, (0, 0), (0, 0))
    found["aborted"] = all(one.failure() is not None for one in met) or dist.get_rank() == 0
    return found


@pytest.mark.parametrize(
    ("nodes", "setting", "own", "rails"),
    [
        ([0, 0, 0, 0], "auto", False, [None] * 4),
        ([0, 0, 0, 0], "staged", True, [None] * 4),
        ([0, 1, 2, 3], "auto", True, [None] * 4),
        ([0, 0, 1, 1], "auto", True, [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ([0, 0, 1, 1], "nccl", False, [None] * 4),
    ],
)
def test_calls_on_devices_that_pass_the_host_have_communicators_of_their_own(
    nodes: list[int], setting: str, own: bool, rails: list[list[int] | None]
) -> None:
    reports = conftest.run(beside, 4, nodes=nodes, env={"SMDDP_CUDA": setting}).check().reports
    for report, rail in zip(reports, rails, strict=True):
        assert (report["own"], report["rail"]) == (own, rail)
        assert report["sizes"] == [4] * own + [2] * bool(rail)
        assert report["named as the group"] == [True] * own + [False] * bool(rail)
        assert report["limits"]
        assert report["aborted"]
