//! What fails is told, and no stream is left waiting.

use std::time::{Duration, Instant};

use smddp::{Collective, DType, Error};

use crate::hierarchical::CARRIED;
use crate::job::{Group, Job, children};
use crate::reference::Case;
use smddp_standin::Rank;

pub fn sum(job: &Job, count: usize) -> Case {
    Case::of(Collective::AllReduce, DType::F32, count, 0, job)
}

/// Calls until one is refused: the failure of an earlier call, known at the latest when the stream has passed it.
pub fn told(job: &Job, group: &Group) -> Error {
    let until = Instant::now() + Duration::from_secs(30);
    while Instant::now() < until {
        let case = sum(job, 500);
        match case.try_start(job, group) {
            Ok(memory) => {
                assert!(job.comes_to_rest(), "a stream waits for ever");
                case.free(job, &memory);
            }
            Err(error) => return error,
        }
    }
    panic!("nobody was told");
}

/// Rank 0 calls alone and aborts, which releases its stream; all are told.
pub fn abort_while_one_waits(rank: &Rank, job: &Job, group: &Group) {
    if rank.rank == 0 {
        let late = sum(job, 100_000);
        late.start(job, group);
        assert!(job.comes_to_wait(), "nothing waits for the rank that has not come");
        group.device.abort("a test");
        assert!(job.comes_to_rest(), "the stream still waits");
    }
    rank.barrier("aborted");
    let error = told(job, group);
    assert!(matches!(error, Error::Aborted { .. }), "{error}");
}

fn abort_releases_the_stream(test: &str, nodes: &[usize], wanted: &str) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::wanting(wanted, rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA", wanted)]);
        let first = sum(&job, 100);
        first.run(&job, &group);
        abort_while_one_waits(rank, &job, &group);
        rank.barrier("over");
    });
}

#[test]
fn an_abort_releases_the_stream() {
    abort_releases_the_stream("failures::an_abort_releases_the_stream", &[1, 1], "auto");
}

#[test]
fn an_abort_releases_the_stream_of_nccl_and_host() {
    abort_releases_the_stream("failures::an_abort_releases_the_stream_of_nccl_and_host", &[2, 2], "auto");
}

#[test]
fn an_abort_releases_the_stream_of_nccl() {
    abort_releases_the_stream("failures::an_abort_releases_the_stream_of_nccl", &[2], "auto");
}

#[test]
fn an_abort_releases_the_stream_of_nccl_between_nodes() {
    let test = "failures::an_abort_releases_the_stream_of_nccl_between_nodes";
    abort_releases_the_stream(test, &[2, 1], "nccl");
}

/// NCCL waits for ever for a rank that does not come; the call's limit ends that.
#[test]
fn a_call_that_passes_its_limit_releases_the_stream_of_nccl() {
    children("failures::a_call_that_passes_its_limit_releases_the_stream_of_nccl", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let first = sum(&job, 100);
        first.run(&job, &group);
        if rank.rank == 0 {
            group.device.set_timeout(Duration::from_secs(1));
            sum(&job, 1000).start(&job, &group);
            assert!(job.comes_to_rest(), "the stream still waits");
            let error = told(&job, &group);
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            assert!(error.to_string().contains("all_reduce"), "{error}");
        }
        rank.barrier("too late");
        let error = told(&job, &group);
        assert!(error.to_string().contains("all_reduce"), "{error}");
        rank.barrier("over");
    });
}

/// The group's limit holds for the part between nodes too, whose ranks know whom they wait for.
#[test]
fn a_new_limit_reaches_the_rail() {
    let nodes = &[2, 2];
    children("failures::a_new_limit_reaches_the_rail", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        rank.barrier("made");
        if rank.rank < 2 {
            group.device.set_timeout(Duration::from_secs(1));
            let case = sum(&job, 1000);
            let placed = case.place(&job);
            let started = case.launch(&group, &placed, job.stream_address(), None).unwrap();
            assert!(job.comes_to_rest(), "the stream still waits");
            let error = started.error().unwrap();
            let named = matches!(&error, Error::Timeout { missing, .. } if !missing.is_empty());
            assert!(named, "{error}");
        }
        rank.barrier("over");
    });
}

fn a_death_releases_the_stream(test: &str, nodes: &[usize], wanted: &str) {
    let last = nodes.iter().sum::<usize>() - 1;
    children(test, nodes, &[]).dies(last).run(|rank| {
        let job = Job::wanting(wanted, rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA", wanted)]);
        rank.barrier("both");
        if rank.rank == last {
            std::process::exit(3);
        }
        sum(&job, 1000).start(&job, &group);
        assert!(job.comes_to_rest(), "the stream still waits");
        let error = told(&job, &group);
        assert!(error.to_string().contains(&format!("rank {last}")), "{error}");
    });
}

#[test]
fn a_rank_that_dies_releases_the_stream_of_nccl() {
    a_death_releases_the_stream("failures::a_rank_that_dies_releases_the_stream_of_nccl", &[2], "auto");
}

#[test]
fn a_rank_that_dies_releases_the_stream_of_nccl_between_nodes() {
    let test = "failures::a_rank_that_dies_releases_the_stream_of_nccl_between_nodes";
    a_death_releases_the_stream(test, &[1, 1], "nccl");
}

#[test]
fn a_rank_that_dies_is_named() {
    children("failures::a_rank_that_dies_is_named", &[1, 1], &[]).dies(1).run(|rank| {
        let job = Job::start(rank, &[1, 1]);
        let group = job.group("world", &[]);
        let first = sum(&job, 100);
        first.run(&job, &group);
        rank.barrier("both");
        if rank.rank == 1 {
            std::process::exit(3);
        }
        let error = told(&job, &group);
        assert!(error.to_string().contains("rank 1"), "{error}");
    });
}

#[test]
fn calls_that_differ_are_named() {
    children("failures::calls_that_differ_are_named", &[1, 1], &[]).run(|rank| {
        let job = Job::start(rank, &[1, 1]);
        let group = job.group("world", &[]);
        sum(&job, 1000 + rank.rank).start(&job, &group);
        assert!(job.comes_to_rest(), "the stream still waits");
        let error = told(&job, &group);
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        rank.barrier("over");
    });
}

/// Each call of the driver that enqueues a piece fails once, at its first, or a later, piece.
#[test]
fn a_driver_call_that_fails_is_told_on_all_ranks() {
    const CALLS: [&str; 6] = [
        "cuMemcpyDtoHAsync_v2",
        "cuStreamWriteValue32_v2",
        "cuStreamWaitValue32_v2",
        "cuMemcpyHtoDAsync_v2",
        "cuEventRecord",
        "cuStreamWaitEvent",
    ];
    children("failures::a_driver_call_that_fails_is_told_on_all_ranks", &[1, 1], &[]).run(|rank| {
        let job = Job::start(rank, &[1, 1]);
        for name in CALLS {
            for nth in [1, 4] {
                let group = job.group(&format!("{name}-{nth}"), &[("SMDDP_CUDA_SLOT", "64K")]);
                rank.barrier(&format!("{name}-{nth}"));
                let case = sum(&job, 60_000);
                // Its own copies first: they are calls of the driver too.
                let before = if name == "cuMemcpyHtoDAsync_v2" { 1 } else { 0 };
                if rank.rank == 0 {
                    job.control.fail(name, before + nth, 1);
                }
                let outcome = case.try_start(&job, &group);
                if rank.rank == 0 {
                    let error = outcome.err().unwrap_or_else(|| panic!("call {nth} of {name} did not fail"));
                    assert!(matches!(error, Error::Transport { transport: "CUDA", .. }), "{error}");
                }
                assert!(job.comes_to_rest(), "a stream waits for ever after {name}");
                told(&job, &group);
                rank.barrier(&format!("{name}-{nth}-over"));
            }
        }
    });
}

/// What is to come before a call cannot be waited for: nothing of it is enqueued, and the others make theirs.
fn a_call_that_cannot_be_entered_is_told_on_all_ranks(test: &str, nodes: &[usize]) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let other = job.new_stream();
        for name in ["cuEventRecord", "cuStreamWaitEvent"] {
            let group = job.group(name, &[]);
            let case = sum(&job, 1000);
            case.run(&job, &group);
            let placed = case.place(&job);
            rank.barrier(name);
            if rank.rank == 0 {
                job.control.fail(name, 1, 1);
            }
            let outcome = case.launch(&group, &placed, job.stream_address(), Some(other.addr() as u64));
            if rank.rank == 0 {
                let error = outcome.err().unwrap_or_else(|| panic!("{name} did not fail"));
                assert!(matches!(error, Error::Transport { transport: "CUDA", .. }), "{error}");
            }
            assert!(job.comes_to_rest(), "a stream waits for ever after {name}");
            told(&job, &group);
            rank.barrier(&format!("{name}-over"));
        }
        job.end_stream(other);
    });
}

#[test]
fn a_call_that_cannot_be_entered_between_nodes_is_told_on_all_ranks() {
    let test = "failures::a_call_that_cannot_be_entered_between_nodes_is_told_on_all_ranks";
    a_call_that_cannot_be_entered_is_told_on_all_ranks(test, &[1, 1]);
}

#[test]
fn a_call_that_cannot_be_entered_within_a_node_is_told_on_all_ranks() {
    let test = "failures::a_call_that_cannot_be_entered_within_a_node_is_told_on_all_ranks";
    a_call_that_cannot_be_entered_is_told_on_all_ranks(test, &[2]);
}

/// In the node's part, where no other rank has come, and on the rail, where the ranks of the other node have not.
#[test]
fn an_abort_releases_every_call_over_nccl_and_host() {
    let nodes = &[2, 2];
    children("failures::an_abort_releases_every_call_over_nccl_and_host", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        for collective in CARRIED {
            for who in [1, 2] {
                let name = format!("{collective}-{who}");
                let group = job.group(&name, &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "2")]);
                // Of the other node, so that a broadcast has what to wait for.
                let late = Case::of(collective, DType::F32, 100_000, 2, &job);
                let memory = (rank.rank < who).then(|| late.start(&job, &group));
                rank.barrier(&format!("{name}-started"));
                if rank.rank == 0 {
                    assert!(job.comes_to_wait(), "{name}: nothing waits for ranks that have not come");
                    group.device.abort("a test");
                }
                assert!(job.comes_to_rest(), "{name}: the stream still waits");
                rank.barrier(&name);
                if let Some(memory) = memory {
                    late.free(&job, &memory);
                }
                let error = told(&job, &group);
                assert!(matches!(error, Error::Aborted { .. }), "{name}: {error}");
                rank.barrier(&format!("{name}-over"));
            }
        }
    });
}

/// Each call of NCCL and of the driver fails once, in the first chunk or a later one.
#[test]
fn a_call_that_fails_between_nccl_and_host_is_told_on_all_ranks() {
    const CALLS: [(Collective, &str); 10] = [
        (Collective::AllReduce, "ncclReduceScatter"),
        (Collective::AllReduce, "ncclAllGather"),
        (Collective::ReduceScatter, "ncclGroupStart"),
        (Collective::ReduceScatter, "ncclReduce"),
        (Collective::ReduceScatter, "ncclGroupEnd"),
        (Collective::ReduceScatter, "cuMemcpyDtoHAsync_v2"),
        (Collective::AllGather, "ncclBroadcast"),
        (Collective::AllGather, "ncclGroupEnd"),
        (Collective::AllGather, "cuStreamWaitValue32_v2"),
        (Collective::AllGather, "cuStreamWaitEvent"),
    ];
    let nodes = &[2, 2];
    let test = "failures::a_call_that_fails_between_nccl_and_host_is_told_on_all_ranks";
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        for (collective, name) in CALLS {
            for nth in [1, 3] {
                let label = format!("{collective}-{name}-{nth}");
                let group = job.group(&label, &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "2")]);
                rank.barrier(&label);
                let case = Case::of(collective, DType::F32, 60_000, 0, &job);
                if rank.rank == 0 {
                    job.control.fail(name, nth, 1);
                }
                let outcome = case.try_start(&job, &group);
                if rank.rank == 0 {
                    let error = outcome.err().unwrap_or_else(|| panic!("{label} did not fail"));
                    assert!(matches!(error, Error::Transport { .. }), "{label}: {error}");
                }
                assert!(job.comes_to_rest(), "a stream waits for ever after {label}");
                told(&job, &group);
                rank.barrier(&format!("{label}-over"));
            }
        }
    });
}

#[test]
fn a_machine_without_devices_says_so() {
    children("failures::a_machine_without_devices_says_so", &[1], &[("SMDDP_STANDIN_DEVICES", "0")]).run(
        |_| {
            let error = smddp::cuda::use_driver(smddp_standin::paths().cuda.as_os_str()).unwrap_err();
            assert!(error.to_string().contains("CUDA_ERROR_NO_DEVICE"), "{error}");
        },
    );
}

#[test]
fn an_nccl_that_is_not_there_is_told_on_all_ranks() {
    children("failures::an_nccl_that_is_not_there_is_told_on_all_ranks", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let missing = if rank.rank == 1 { "/nowhere/libnccl.so.2" } else { "" };
        let settings: &[(&str, &str)] = if missing.is_empty() { &[] } else { &[("SMDDP_NCCL", missing)] };
        let error = job.try_group("world", settings).err().unwrap();
        let named = if rank.rank == 1 { missing } else { "rank 1" };
        assert!(error.to_string().contains(named), "{error}");
        rank.barrier("over");
    });
}
