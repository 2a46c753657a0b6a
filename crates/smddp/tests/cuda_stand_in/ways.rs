//! The ways that calls take between nodes, as SMDDP_CUDA_ALGORITHM has them.

use std::time::{Duration, Instant};

use smddp::{Collective, DType, Error, ReduceOp};

use crate::job::{Job, LIMIT, children};
use crate::reference::Case;
use crate::watch::{FOR_EVER, threads, until};

const NODES: &[usize] = &[2, 2];
const ALGORITHM: &str = "SMDDP_CUDA_ALGORITHM";
const SLOTS: [(&str, &str); 2] = [("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "3")];

/// What a call was made of: copies to the host, NCCL's all_reduce, and its parts in the node.
fn counted(job: &Job) -> [u64; 3] {
    let calls = |name: &str| job.control.calls(name);
    let in_node = calls("ncclReduceScatter") + calls("ncclReduce") + calls("ncclAllGather");
    [calls("cuMemcpyDtoHAsync_v2"), calls("ncclAllReduce"), in_node]
}

#[test]
fn a_call_goes_the_way_that_the_setting_gives_its_size() {
    children("ways::a_call_goes_the_way_that_the_setting_gives_its_size", NODES, &[]).run(|rank| {
        let job = Job::wanting("nccl", rank, NODES);
        let ways = (ALGORITHM, "all_reduce:0-1K=nccl,all_gather=staged,reduce=nccl");
        let group = job.group("world", &[SLOTS[0], SLOTS[1], ways]);
        let sum = |count| Case::of(Collective::AllReduce, DType::F32, count, 0, &job);
        let bits = Case::reducing(Collective::AllReduce, DType::I32, ReduceOp::BitXor, 100, &job);
        let expected = [
            ("up to the bound", sum(256), [0, 1, 0]),
            ("above it", sum(258), [1, 0, 2]),
            ("what NCCL has not", bits, [1, 0, 0]),
            ("staged", Case::of(Collective::AllGather, DType::F32, 100, 0, &job), [1, 0, 0]),
            ("a root", Case::of(Collective::Reduce, DType::F32, 100, 3, &job), [0, 0, 1]),
        ];
        for (what, case, made_of) in expected {
            let before = counted(&job);
            let memory = case.start(&job, &group);
            let now = counted(&job);
            let difference: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
            assert_eq!(difference, made_of, "{what}");
            job.synchronize();
            case.check(&job, &memory);
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}

#[test]
fn ranks_whose_ways_differ_are_told() {
    children("ways::ranks_whose_ways_differ_are_told", NODES, &[]).run(|rank| {
        let job = Job::wanting("nccl", rank, NODES);
        let ways = if rank.rank == 3 { "" } else { "all_reduce=nccl" };
        let error = job.try_group("world", &[(ALGORITHM, ways)]).err().unwrap();
        assert!(error.to_string().contains(ALGORITHM), "{error}");
        rank.barrier("over");
    });
}

#[test]
fn a_way_that_is_none_is_told_on_all_ranks() {
    children("ways::a_way_that_is_none_is_told_on_all_ranks", NODES, &[]).run(|rank| {
        let job = Job::wanting("nccl", rank, NODES);
        let ways = if rank.rank == 2 { "all_reduce=pigeon" } else { "" };
        let error = job.try_group("world", &[(ALGORITHM, ways)]).err().unwrap();
        let named = if rank.rank == 2 { "pigeon" } else { "rank 2" };
        assert!(error.to_string().contains(named), "{error}");
        rank.barrier("over");
    });
}

/// A communicator of all ranks is watched as that of the node is.
#[test]
fn an_abort_releases_a_call_over_all_ranks() {
    children("ways::an_abort_releases_a_call_over_all_ranks", NODES, &[]).run(|rank| {
        let job = Job::wanting("nccl", rank, NODES);
        let group = job.group("world", &[(ALGORITHM, "all_reduce=nccl")]);
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        // Rank 3 never comes.
        let memory = (rank.rank != 3).then(|| case.start(&job, &group));
        rank.barrier("started");
        if rank.rank == 0 {
            group.device.abort("a test");
        }
        assert!(job.comes_to_rest(), "the stream still waits");
        rank.barrier("aborted");
        if let Some(memory) = memory {
            case.free(&job, &memory);
        }
        let error = group.device.failure().unwrap();
        assert!(matches!(error, Error::Aborted { .. }), "{error}");
        rank.barrier("over");
    });
}

/// Two that the calls were given, and two of the group's own.
const STREAMS: u64 = 4;

/// The group has two communicators, whose kernels must come in one order on all devices, whatever their streams.
fn calls_of_two_communicators_follow_one_another(test: &str, counts: [usize; 2]) {
    children(test, NODES, &[]).run(|rank| {
        let job = Job::wanting("nccl", rank, NODES);
        let group = job.group("world", &[SLOTS[0], SLOTS[1], (ALGORITHM, "all_reduce:0-1K=nccl")]);
        let cases = counts.map(|count| Case::of(Collective::AllReduce, DType::F32, count, 0, &job));
        let placed = cases.each_ref().map(|case| case.place(&job));
        job.synchronize();
        let other = job.new_stream();
        let hold = job.hold();
        rank.barrier("held");
        for (case, (placed, stream)) in
            cases.iter().zip(placed.iter().zip([job.stream_address(), other.addr() as u64]))
        {
            case.launch(&group, placed, stream, None).unwrap();
        }
        rank.barrier("started");
        // All that can begin has begun: a stream stands at the hold, and so do the others that take part in the calls, or at
        // one another; the second call is where it would have overtaken the first.
        let started = Instant::now();
        while job.control.parked() < STREAMS {
            assert!(started.elapsed() < LIMIT, "{} streams stand", job.control.parked());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(job.control.calls("nccl"), 0, "the second has overtaken the first");
        rank.barrier("seen");
        hold.release();
        job.synchronize_stream(other);
        for (case, placed) in cases.iter().zip(&placed) {
            case.check(&job, placed);
        }
        job.end_stream(other);
        rank.barrier("over");
        group.end();
    });
}

#[test]
fn a_call_over_all_ranks_follows_one_of_the_node() {
    let test = "ways::a_call_over_all_ranks_follows_one_of_the_node";
    calls_of_two_communicators_follow_one_another(test, [5000, 100]);
}

#[test]
fn a_call_of_the_node_follows_one_over_all_ranks() {
    let test = "ways::a_call_of_the_node_follows_one_over_all_ranks";
    calls_of_two_communicators_follow_one_another(test, [100, 5000]);
}

/// A call of the node lies behind one of all ranks that never ends: an abort of the node's communicator waits for that of the other.
#[test]
fn both_communicators_are_aborted_at_once() {
    children("ways::both_communicators_are_aborted_at_once", NODES, &FOR_EVER).run(|rank| {
        let job = Job::wanting("nccl", rank, NODES);
        let group = job.group("world", &[SLOTS[0], SLOTS[1], (ALGORITHM, "all_reduce:0-1K=nccl")]);
        let cases = [100, 5000].map(|count| Case::of(Collective::AllReduce, DType::F32, count, 0, &job));
        let placed = cases.each_ref().map(|case| case.place(&job));
        job.synchronize();
        // An abort reaches ranks that are still making the group, too.
        rank.barrier("made");
        if rank.rank == 0 {
            for (case, placed) in cases.iter().zip(&placed) {
                case.launch(&group, placed, job.stream_address(), None).unwrap();
            }
            assert!(job.comes_to_wait(), "nothing waits for ranks that have not come");
            let since = Instant::now();
            group.device.abort("a test");
            // What is given up is given up after 5 s.
            assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
            assert!(job.comes_to_rest(), "the stream still waits");
            assert!(
                until(|| !threads().iter().any(|name| name.starts_with("smddp-nccl"))),
                "{:?}",
                threads()
            );
        }
        rank.barrier("aborted");
        rank.barrier("over");
    });
}
