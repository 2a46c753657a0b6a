//! Pinned memory: it stays as long as a device or an operation may use it, and no longer.

use smddp::{Collective, DType, Error};

use crate::failures::{sum, told};
use crate::job::{Job, children};
use crate::reference::Case;

const NODES: &[usize] = &[1, 1];

/// Of a call with rows of different lengths, whose copy to the host is under way when the next step fails.
#[test]
fn memory_of_a_call_that_fails_midway_stays() {
    const STEPS: [&str; 4] =
        ["cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2", "cuMemcpyHtoDAsync_v2", "cuEventRecord"];
    children("memory::memory_of_a_call_that_fails_midway_stays", NODES, &[]).run(|rank| {
        let job = Job::start(rank, NODES);
        for step in STEPS {
            let group = job.group(step, &[]);
            let case = Case::uneven_exchange(5000, &job);
            let placed = case.place(&job);
            let hold = job.hold();
            rank.barrier(&format!("{step}-before"));
            if rank.rank == 0 {
                // The first event is that of the stream's place, before there is any memory.
                job.control.fail(step, if step == "cuEventRecord" { 2 } else { 1 }, 1);
            }
            let outcome = case.launch(&group, &placed, job.stream_address(), None);
            assert!(rank.rank != 0 || outcome.is_err(), "{step} did not fail");
            hold.release();
            told(&job, &group);
            rank.barrier(&format!("{step}-told"));
            group.end();
            assert_eq!(job.control.lasting_error(), None, "{step}");
            case.free(&job, &placed);
        }
        rank.barrier("over");
    });
}

/// A stream that does not answer may be at work.
#[test]
fn memory_of_a_stream_that_does_not_answer_stays() {
    children("memory::memory_of_a_stream_that_does_not_answer_stays", NODES, &[]).run(|rank| {
        let job = Job::start(rank, NODES);
        let group = job.group("world", &[]);
        let case = sum(&job, 1000);
        let placed = case.place(&job);
        let hold = job.hold();
        case.launch(&group, &placed, job.stream_address(), None).unwrap();
        rank.barrier("started");
        for nth in [1, 2] {
            job.control.fail("cuStreamQuery", nth, 999);
        }
        group.device.abort("a test");
        hold.release();
        assert!(job.comes_to_rest(), "the stream still waits");
        assert_eq!(job.control.lasting_error(), None);
        rank.barrier("over");
    });
}

#[test]
fn a_call_that_finds_no_pinned_memory_is_told_on_all_ranks() {
    children("memory::a_call_that_finds_no_pinned_memory_is_told_on_all_ranks", NODES, &[]).run(|rank| {
        let job = Job::start(rank, NODES);
        let group = job.group("world", &[]);
        let case = Case::uneven_exchange(5000, &job);
        rank.barrier("made");
        if rank.rank == 0 {
            job.control.fail("cuMemHostRegister_v2", 1, 2);
        }
        let outcome = case.try_start(&job, &group);
        assert!(job.comes_to_rest(), "the stream still waits");
        if rank.rank == 0 {
            let error = outcome.err().unwrap();
            assert!(matches!(error, Error::Resource { resource: "pinned memory", .. }), "{error}");
        }
        let error = told(&job, &group).to_string();
        assert!(error.contains("pinned memory"), "{error}");
        rank.barrier("over");
    });
}

/// Pinning is slow, and unpinning waits for the device: calls of like sizes that follow one another use one memory, and what was
/// used is kept.
#[test]
fn memory_of_uneven_calls_is_used_again() {
    children("memory::memory_of_uneven_calls_is_used_again", NODES, &[]).run(|rank| {
        let job = Job::start(rank, NODES);
        let group = job.group("world", &[]);
        let pinned = || job.control.calls("cuMemHostRegister_v2");
        let before = pinned();
        for round in 0..20 {
            let case = Case::uneven_exchange(9000 - 200 * round, &job);
            let placed = case.start(&job, &group);
            case.check(&job, &placed);
        }
        assert_eq!(pinned() - before, 1);
        // All at once, each that is under way needs its own.
        let cases: Vec<Case> = (0..6).map(|i| Case::uneven_exchange(20_000 + i, &job)).collect();
        let running: Vec<_> = cases.iter().map(|case| case.start(&job, &group)).collect();
        for (case, placed) in cases.iter().zip(&running) {
            case.check(&job, placed);
        }
        let last = Case::uneven_gather(10, &job);
        let placed = last.start(&job, &group);
        last.check(&job, &placed);
        assert!((2..=7).contains(&(pinned() - before)), "{}", pinned() - before);
        assert_eq!(job.control.calls("cuMemHostUnregister"), 0);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Bytes of mappings whose contents a forked child does not get.
fn kept_from_children() -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut bytes, mut found) = (0, 0);
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Size:") {
            bytes = 1024 * size.trim_end_matches("kB").trim().parse::<usize>().unwrap();
        }
        if line
            .strip_prefix("VmFlags:")
            .is_some_and(|flags| flags.split(' ').any(|flag| ["dc", "wf"].contains(&flag)))
        {
            found += bytes;
        }
    }
    found
}

/// Else a child that is forked while the device writes takes the pages with it, and what is written is lost.
#[test]
fn all_that_devices_write_to_is_kept_from_children() {
    children("memory::all_that_devices_write_to_is_kept_from_children", NODES, &[]).run(|rank| {
        let job = Job::start(rank, NODES);
        let host = job.host("host", &[]);
        let before = kept_from_children();
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "2")]);
        let (slots, words) = (2 * (64 << 10), 4096);
        assert_eq!(kept_from_children() - before, slots + words);
        rank.barrier("over");
        group.end();
        assert_eq!(kept_from_children(), before);
        host.shutdown();
        job.end();
    });
}

/// NCCL's kernels read and write whole elements, some of 16 bytes, in the slots' memory on the device.
#[test]
fn slots_of_an_odd_size_hold_aligned_memory() {
    let nodes = &[2, 2];
    children("memory::slots_of_an_odd_size_hold_aligned_memory", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "100002"), ("SMDDP_CUDA_SLOTS", "3")]);
        for collective in [Collective::ReduceScatter, Collective::AllReduce, Collective::AllToAll] {
            let case = Case::of(collective, DType::F32, 70_000, 0, &job);
            case.run(&job, &group);
        }
        rank.barrier("over");
        group.end();
        job.end();
    });
}
