//! What is ordered behind what, and what a call leaves as it found it.

use std::time::{Duration, Instant};

use smddp::{Collective, DType, Error, ReduceOp};

use crate::job::{Job, children, enter};
use crate::reference::Case;

/// The parts of two calls in the node go through device memory of one slot: the second waits until the first's is sent.
#[test]
fn calls_on_two_streams_keep_off_each_others_slots() {
    let nodes = &[2, 2];
    let slow = [("SMDDP_STANDIN_POISON", "start"), ("SMDDP_STANDIN_COPY_US", "20000")];
    children("streams::calls_on_two_streams_keep_off_each_others_slots", nodes, &slow).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "2")]);
        // Two chunks each: half of a slot holds 4096 columns of a row for each node.
        let first = Case::of(Collective::ReduceScatter, DType::F32, 8192, 0, &job);
        let second = Case::reducing(Collective::ReduceScatter, DType::F32, ReduceOp::Sum, 8192, &job);
        let (one, two) = (first.place(&job), second.place(&job));
        job.synchronize();
        let other = job.new_stream();
        first.launch(&group, &one, job.stream_address(), None).unwrap();
        second.launch(&group, &two, other.addr() as u64, None).unwrap();
        job.synchronize_stream(other);
        first.check(&job, &one);
        second.check(&job, &two);
        job.end_stream(other);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Another thread may make the calls on the CPU's memory, so that they come in one order with those on the device on no two ranks.
#[test]
fn calls_on_the_host_have_no_order_with_those_on_the_device() {
    let nodes = &[1, 1];
    children("streams::calls_on_the_host_have_no_order_with_those_on_the_device", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        let on_device = || case.launch(&group, &placed, job.stream_address(), None).map(|_| ());
        let on_host = || group.host.all_reduce(&mut [1i64, 2], ReduceOp::Sum);
        let (first, second) =
            if rank.rank == 0 { (on_device(), on_host()) } else { (on_host(), on_device()) };
        first.and(second).unwrap();
        job.synchronize();
        case.check(&job, &placed);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// Who ends a group may look around, at signals for instance, while exchanges are still to come.
#[test]
fn the_end_of_calls_is_waited_for_in_slices() {
    const SLICE: Duration = Duration::from_millis(20);
    let nodes = &[1, 1];
    children("streams::the_end_of_calls_is_waited_for_in_slices", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        assert!(group.device.finish_for(Instant::now(), SLICE), "nothing is under way");
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        if rank.rank == 0 {
            case.launch(&group, &placed, job.stream_address(), None).unwrap();
            assert!(!group.device.finish_for(Instant::now(), SLICE), "rank 1 has not come");
            rank.barrier("waited");
        } else {
            rank.barrier("waited");
            case.launch(&group, &placed, job.stream_address(), None).unwrap();
        }
        let since = Instant::now();
        while !group.device.finish_for(since, SLICE) {}
        group.device.shutdown();
        case.check(&job, &placed);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// The program's current device is another one, and stays so.
#[test]
fn the_current_device_stays() {
    let nodes = &[2, 2];
    children("streams::the_current_device_stays", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let mut other = std::ptr::null_mut();
        // SAFETY: a place for the context, of a device no rank has.
        assert_eq!(unsafe { (job.driver.primary_retain)(&raw mut other, 5) }, 0);
        let current = || {
            let mut found = std::ptr::null_mut();
            // SAFETY: a place for the context.
            assert_eq!(unsafe { (job.driver.ctx_current)(&raw mut found) }, 0);
            found
        };
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        let placed = case.place(&job);
        enter(&job.driver, other.addr());
        let group = job.group("world", &[]);
        assert_eq!(current(), other, "making the group");
        let started = case.launch(&group, &placed, job.stream_address(), None).unwrap();
        assert_eq!(current(), other, "a call");
        // SAFETY: streams of the group's device.
        unsafe {
            started.past().order(job.stream_address()).unwrap();
            started.past().extend(job.stream_address()).unwrap();
        }
        group.device.wait(&started, Duration::from_secs(20)).unwrap();
        assert_eq!(current(), other, "waiting for it");
        rank.barrier("over");
        group.end();
        assert_eq!(current(), other, "ending the group");
        enter(&job.driver, job.context());
        drop(started);
        case.check(&job, &placed);
        job.end();
    });
}

/// A device that is busy while its streams' words are tried is not taken for one without; later groups need not try.
#[test]
fn words_are_found_on_a_busy_device() {
    let nodes = &[1, 1];
    // What the rank's stream waits for, all streams wait for.
    let shared = [("SMDDP_STANDIN_ONE_QUEUE", "1")];
    children("streams::words_are_found_on_a_busy_device", nodes, &shared).run(|rank| {
        let job = Job::start(rank, nodes);
        let hold = job.hold();
        let group = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_secs(4));
                hold.release();
            });
            job.group("world", &[])
        });
        assert!(!group.device.describe().contains("host waits"), "{}", group.device.describe());
        let waits = || job.control.calls("cuStreamWaitValue32_v2");
        let before = waits();
        let later = job.group("later", &[]);
        assert_eq!(waits(), before);
        for group in [&group, &later] {
            Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job).run(&job, group);
        }
        rank.barrier("over");
        group.end();
        later.end();
    });
}

/// The rank's stream is busy for longer than the host waits for its own work.
fn calls_behind_a_busy_stream_are_waited_for(test: &str, nodes: &[usize]) {
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K")]);
        let case = Case::of(Collective::AllReduce, DType::F32, 60_000, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        let hold = job.hold();
        let started = case.launch(&group, &placed, job.stream_address(), None).unwrap();
        rank.barrier("started");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_secs(7));
                hold.release();
            });
            group.end();
        });
        assert_eq!(started.error(), None);
        case.check(&job, &placed);
        rank.barrier("over");
    });
}

#[test]
fn calls_behind_a_busy_stream_are_waited_for_at_the_end() {
    let test = "streams::calls_behind_a_busy_stream_are_waited_for_at_the_end";
    calls_behind_a_busy_stream_are_waited_for(test, &[1, 1]);
}

#[test]
fn calls_behind_a_busy_stream_are_waited_for_at_the_end_of_nodes_of_2() {
    let test = "streams::calls_behind_a_busy_stream_are_waited_for_at_the_end_of_nodes_of_2";
    calls_behind_a_busy_stream_are_waited_for(test, &[2, 2]);
}

/// Nothing is waited for beyond the group's limit, and the calls say that they failed.
#[test]
fn a_stream_that_stays_busy_does_not_keep_the_group_from_its_end() {
    let nodes = &[1, 1];
    let test = "streams::a_stream_that_stays_busy_does_not_keep_the_group_from_its_end";
    children(test, nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::AllReduce, DType::F32, 1000, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        let hold = job.hold();
        // Later than the group's: the stream, not the call, is what takes too long.
        let started = case.launch(&group, &placed, job.stream_address(), None).unwrap();
        group.device.set_timeout(Duration::from_secs(1));
        rank.barrier("started");
        let since = Instant::now();
        group.end();
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
        assert!(started.error().is_some(), "nobody is told");
        hold.release();
        assert!(job.comes_to_rest(), "the stream still waits");
        rank.barrier("over");
    });
}

/// What a call that failed midway has enqueued comes before what the caller enqueues next: its memory may be used anew.
fn a_failed_call_is_past(test: &str, nodes: &[usize], (function, nth): (&str, u64)) {
    // The copies to the device come late.
    children(test, nodes, &[("SMDDP_STANDIN_DELAY_US", "20000")]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[("SMDDP_CUDA_SLOT", "64K")]);
        let case = Case::of(Collective::AllReduce, DType::F32, 60_000, 0, &job);
        let placed = case.place(&job);
        let new: Vec<u8> = (0..placed.output.bytes).map(|i| (i % 251) as u8).collect();
        // Until all of it is enqueued nothing of the call runs.
        let hold = job.hold();
        rank.barrier("made");
        if rank.rank == 0 {
            job.control.fail(function, nth, 1);
        }
        let outcome = case.launch(&group, &placed, job.stream_address(), None);
        if rank.rank == 0 {
            let error = outcome.err().unwrap();
            assert!(matches!(error, Error::Transport { .. }), "{error}");
            job.write(placed.output, &new);
        }
        hold.release();
        assert!(job.comes_to_rest(), "the stream still waits");
        group.end();
        if rank.rank == 0 {
            assert!(job.read(placed.output) == new, "written by a call that has failed");
        }
        assert_eq!(job.control.lasting_error(), None);
        rank.barrier("over");
    });
}

#[test]
fn a_failed_call_of_pieces_is_past() {
    a_failed_call_is_past("streams::a_failed_call_of_pieces_is_past", &[1, 1], ("cuMemcpyHtoDAsync_v2", 8));
}

#[test]
fn a_failed_call_of_chunks_is_past() {
    a_failed_call_is_past("streams::a_failed_call_of_chunks_is_past", &[2, 2], ("ncclReduceScatter", 4));
}
