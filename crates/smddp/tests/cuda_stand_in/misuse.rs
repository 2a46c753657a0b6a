//! Bad input: a clear error on every rank, nothing enqueued, nothing hangs.

use std::time::Duration;

use smddp::cuda::{DeviceCall, DeviceMessage, Memory};
use smddp::{Collective, DType, Error, ReduceOp};

use crate::job::{Group, Job, children};
use crate::reference::{Case, Placed};

/// A group that a refused call has left as it was.
fn still_works(job: &Job, group: &Group) {
    let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, job);
    let memory = case.start(job, group);
    job.synchronize();
    case.check(job, &memory);
}

/// As of a tensor whose memory was given back.
fn memory_that_is_none(test: &str, nodes: &[usize]) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let none = Memory { address: 0, bytes: 400 };
        for collective in [Collective::AllReduce, Collective::AllGather] {
            let case = Case::of(collective, DType::F32, 100, 0, &job);
            let placed = case.place(&job);
            for (name, wrong) in [
                ("input", Placed { input: none, ..placed }),
                ("output", Placed { output: Memory { address: 0, ..placed.output }, ..placed }),
            ] {
                let refused = case.launch(&group, &wrong, job.stream_address(), None).err().unwrap();
                let named = matches!(&refused, Error::Argument { argument, .. } if *argument == name);
                assert!(named, "{collective}, {name}: {refused}");
            }
            job.synchronize();
            case.free(&job, &placed);
        }
        if group.device.carries_messages() {
            let message = DeviceMessage { peer: 1 - rank.rank, memory: none, is_sent: rank.rank == 0 };
            // SAFETY: nothing is enqueued.
            let refused = unsafe { group.device.exchange(&[message], None, job.stream_address(), None) };
            assert!(matches!(refused, Err(Error::Argument { .. })), "{:?}", refused.err());
        }
        // Nothing at nowhere is no mistake.
        let empty = Case::of(Collective::AllReduce, DType::F32, 0, 0, &job);
        let nothing = Memory { address: 0, bytes: 0 };
        empty
            .launch(&group, &Placed { input: nothing, output: nothing }, job.stream_address(), None)
            .unwrap();
        still_works(&job, &group);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn memory_that_is_none_is_refused_by_nccl() {
    memory_that_is_none("misuse::memory_that_is_none_is_refused_by_nccl", &[2]);
}

#[test]
fn memory_that_is_none_is_refused_between_nodes() {
    memory_that_is_none("misuse::memory_that_is_none_is_refused_between_nodes", &[1, 1]);
}

/// A graph's replay would not wait for the other nodes, whichever of the call's streams it is captured from.
#[test]
fn streams_that_capture_a_graph_are_refused_between_nodes() {
    let nodes = &[1, 1];
    children("misuse::streams_that_capture_a_graph_are_refused_between_nodes", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let other = job.new_stream();
        let (ours, theirs) = (job.stream_address(), other.addr() as u64);
        let case = Case::of(Collective::AllReduce, DType::F32, 100, 0, &job);
        let placed = case.place(&job);
        for captures in [job.stream, other] {
            let refused = job.capture(captures, || case.launch(&group, &placed, ours, Some(theirs)).err());
            assert!(matches!(refused, Some(Error::Argument { argument: "stream", .. })), "{refused:?}");
        }
        case.launch(&group, &placed, ours, Some(theirs)).unwrap();
        case.check(&job, &placed);
        job.end_stream(other);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Only replays of the graph run a call that was captured; asking the driver whether it is over would be an error.
#[test]
fn a_captured_call_is_not_waited_for() {
    let nodes = &[2];
    children("misuse::a_captured_call_is_not_waited_for", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::AllReduce, DType::F32, 100, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        let started = job.capture(job.stream, || {
            let started = case.launch(&group, &placed, job.stream_address(), None).unwrap();
            // SAFETY: the group's stream.
            unsafe { started.past().extend(job.stream_address()).unwrap() };
            started
        });
        job.synchronize();
        assert_eq!((started.past().is_done(), started.error()), (Ok(false), None));
        let refused = group.device.wait(&started, Duration::from_secs(20)).unwrap_err();
        assert!(matches!(refused, Error::Argument { argument: "timeout", .. }), "{refused}");
        drop(started);
        // The events are used anew.
        for _ in 0..3 {
            let (_, started) = case.begin(&job, &group).unwrap();
            group.device.wait(&started, Duration::from_secs(20)).unwrap();
            assert_eq!(started.past().is_done(), Ok(true));
        }
        rank.barrier("over");
        group.end();
    });
}

fn memory_of_the_wrong_length(test: &str, nodes: &[usize]) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let room = job.memory(&[0; 4096]);
        let bytes = |bytes: usize| Memory { bytes, ..room };
        let (count, size) = (100, job.size());
        for collective in Collective::MOVING {
            let (block, all) = (4 * count, 4 * count * size);
            let (input, output) = match collective {
                Collective::AllGather | Collective::Gather => (block, all),
                Collective::ReduceScatter | Collective::Scatter => (all, block),
                Collective::AllToAll => (all, all),
                _ => (block, block),
            };
            for (input, output, named) in
                [(input - 4, output, "input"), (input, output - 1, "output"), (input + 4, output, "input")]
            {
                let call = DeviceCall {
                    collective,
                    dtype: DType::F32,
                    op: ReduceOp::Sum,
                    // Each rank tries as root: the others have less to give.
                    root: rank.rank,
                    count,
                    input: bytes(input),
                    output: bytes(output),
                    counts: None,
                    splits: None,
                    timeout: None,
                };
                // SAFETY: inside of `room`, which is freed after the stream was waited for.
                let refused = unsafe { group.device.start(&call, job.stream_address(), None) };
                match refused.err() {
                    Some(Error::Argument { argument, op, .. }) => {
                        assert_eq!((argument, op.as_str()), (named, collective.name()));
                    }
                    other => panic!("{collective}, {input} and {output} bytes: {other:?}"),
                }
            }
        }
        still_works(&job, &group);
        job.free(room);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn memory_of_the_wrong_length_is_refused_by_nccl() {
    memory_of_the_wrong_length("misuse::memory_of_the_wrong_length_is_refused_by_nccl", &[2]);
}

#[test]
fn memory_of_the_wrong_length_is_refused_between_nodes() {
    memory_of_the_wrong_length("misuse::memory_of_the_wrong_length_is_refused_between_nodes", &[1, 1]);
}

#[test]
fn memory_of_the_wrong_length_is_refused_between_nodes_of_2() {
    memory_of_the_wrong_length("misuse::memory_of_the_wrong_length_is_refused_between_nodes_of_2", &[2, 2]);
}

#[test]
fn no_such_root() {
    children("misuse::no_such_root", &[2], &[]).run(|rank| {
        let job = Job::start(rank, &[2]);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::Broadcast, DType::F32, 10, 0, &job).with_root(2);
        let refused = case.try_start(&job, &group).err().unwrap();
        assert!(matches!(refused, Error::Argument { argument: "root", .. }), "{refused}");
        still_works(&job, &group);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn an_nccl_that_is_too_old_is_named_with_what_is_needed() {
    let old = [("SMDDP_STANDIN_NCCL_VERSION", "21703")];
    children("misuse::an_nccl_that_is_too_old_is_named_with_what_is_needed", &[2], &old).run(|rank| {
        let job = Job::start(rank, &[2]);
        let refused = job.try_group("world", &[]).err().unwrap().to_string();
        assert!(refused.contains("2.17.3") && refused.contains("2.18"), "{refused}");
        rank.barrier("over");
        job.end();
    });
}

#[test]
fn a_driver_that_is_not_there_is_named() {
    children("misuse::a_driver_that_is_not_there_is_named", &[1], &[]).run(|_| {
        let error = smddp::cuda::use_driver("/nowhere/libcuda.so.1".as_ref()).unwrap_err();
        assert!(matches!(error, Error::Library { .. }), "{error}");
        assert!(error.to_string().contains("/nowhere/libcuda.so.1"), "{error}");
    });
}

/// What fails on one rank while the group is made is told there as it is, and elsewhere with that rank's number.
fn told_on_all(
    test: &str,
    (nodes, wanted): (&[usize], &str),
    (who, function, nth, code): (usize, &str, u64, i32),
    words: [&str; 2],
) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::wanting(wanted, rank, nodes);
        rank.barrier("before");
        if rank.rank == who {
            job.control.fail(function, nth, code);
        }
        let settings = [("SMDDP_CUDA", wanted)];
        let error = job.try_group("world", &settings).err().unwrap().to_string();
        let other = format!("rank {who}");
        let expected = if rank.rank == who { words } else { [other.as_str(), "failed in"] };
        assert!(expected.iter().all(|word| error.contains(word)), "rank {}: {error}", rank.rank);
        rank.barrier("told");
        // The next try finds nothing in its way.
        let group = job.group("again", &settings);
        still_works(&job, &group);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn out_of_device_memory() {
    let test = "misuse::out_of_device_memory";
    told_on_all(
        test,
        (&[2, 2], "auto"),
        (1, "cuMemAlloc_v2", 1, 2),
        ["device memory", "CUDA_ERROR_OUT_OF_MEMORY"],
    );
}

const UNPINNED: [&str; 2] = ["CUDA_ERROR_OUT_OF_MEMORY", "ulimit -l"];

#[test]
fn out_of_pinned_memory_for_words() {
    let test = "misuse::out_of_pinned_memory_for_words";
    told_on_all(test, (&[1, 1], "auto"), (1, "cuMemHostRegister_v2", 1, 2), UNPINNED);
}

#[test]
fn out_of_pinned_memory_for_slots() {
    let test = "misuse::out_of_pinned_memory_for_slots";
    told_on_all(test, (&[1, 1], "auto"), (1, "cuMemHostRegister_v2", 3, 2), UNPINNED);
}

#[test]
fn a_device_that_does_not_open() {
    let test = "misuse::a_device_that_does_not_open";
    told_on_all(
        test,
        (&[2], "auto"),
        (1, "cuDevicePrimaryCtxRetain", 1, 101),
        ["opening the device", "CUDA_ERROR_INVALID_DEVICE"],
    );
}

#[test]
fn an_nccl_that_does_not_meet() {
    let test = "misuse::an_nccl_that_does_not_meet";
    told_on_all(test, (&[2, 2], "auto"), (2, "ncclGetUniqueId", 1, 3), ["NCCL", "internal error"]);
}

/// A group whose calls nobody could end is not made.
#[test]
fn a_thread_that_cannot_watch() {
    let test = "misuse::a_thread_that_cannot_watch";
    told_on_all(
        test,
        (&[2], "auto"),
        // After those of the thread that makes the group and of the one that meets for NCCL.
        (1, "cuThreadExchangeStreamCaptureMode", 3, 1),
        ["capture mode", "CUDA_ERROR_INVALID_VALUE"],
    );
}

/// NCCL itself would wait for the rank that does not come until the group's time limit.
#[test]
fn an_nccl_that_fails_on_one_rank() {
    let test = "misuse::an_nccl_that_fails_on_one_rank";
    told_on_all(test, (&[3], "auto"), (1, "ncclCommInitRankConfig", 1, 3), ["NCCL", "internal error"]);
}

/// Word of it goes from node to node, and the ranks of a node that is no neighbour's hear of it too.
#[test]
fn an_nccl_that_fails_on_one_rank_of_another_node() {
    let test = "misuse::an_nccl_that_fails_on_one_rank_of_another_node";
    let nodes = (&[2, 1, 1, 2][..], "nccl");
    told_on_all(test, nodes, (5, "ncclCommInitRankConfig", 1, 3), ["NCCL", "internal error"]);
}
