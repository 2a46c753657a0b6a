//! Graphs that hold calls: NCCL keeps a communicator until they are destroyed.

use std::time::{Duration, Instant};

use smddp::{Collective, DType};

use crate::job::{Job, children};
use crate::reference::Case;
use crate::watch::{FOR_EVER, threads, until};

/// Shorter than NCCL's end is waited for, and longer than what is there to be done.
const SOON: Duration = Duration::from_secs(4);

fn communicators_that_end() -> usize {
    threads().iter().filter(|name| name.starts_with("smddp-nccl-end")).count()
}

/// Both ways to end a group do not wait for what ends with the program's graphs; the communicator ends with those.
fn a_group_ends_before_its_graphs(test: &str, aborts: bool) {
    let nodes = &[2];
    children(test, nodes, &FOR_EVER).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::AllReduce, DType::F32, 100, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        job.capture(job.stream, || case.launch(&group, &placed, job.stream_address(), None)).unwrap();
        job.synchronize();
        rank.barrier("captured");
        let since = Instant::now();
        if aborts {
            group.device.abort("a test");
        } else {
            group.device.shutdown();
        }
        assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
        assert_eq!(communicators_that_end(), 1);
        job.control.destroy_graphs();
        assert!(until(|| communicators_that_end() == 0), "{:?}", threads());
        rank.barrier("over");
    });
}

#[test]
fn a_group_ends_though_graphs_hold_its_calls() {
    a_group_ends_before_its_graphs("graphs::a_group_ends_though_graphs_hold_its_calls", false);
}

#[test]
fn a_group_is_aborted_though_graphs_hold_its_calls() {
    a_group_ends_before_its_graphs("graphs::a_group_is_aborted_though_graphs_hold_its_calls", true);
}

/// A graph that is no more keeps nobody.
#[test]
fn a_group_ends_after_its_graphs() {
    let nodes = &[2];
    children("graphs::a_group_ends_after_its_graphs", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::AllReduce, DType::F32, 100, 0, &job);
        let placed = case.place(&job);
        job.synchronize();
        drop(job.capture(job.stream, || case.launch(&group, &placed, job.stream_address(), None)).unwrap());
        case.check(&job, &placed);
        job.control.destroy_graphs();
        rank.barrier("over");
        group.end();
        assert!(until(|| communicators_that_end() == 0), "{:?}", threads());
        job.end();
    });
}

/// Groups are made and end, memory is pinned and used again, at any time, also while another thread captures.
#[test]
fn staged_calls_and_groups_leave_a_capture_alone() {
    let nodes = &[1, 1];
    children("graphs::staged_calls_and_groups_leave_a_capture_alone", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let case = Case::uneven_exchange(5000, &job);
        let placed = [case.place(&job), case.place(&job)];
        job.synchronize();
        let other = job.new_stream();
        let pinned = || job.control.calls("cuMemHostRegister_v2");
        let again: smddp::Result<u64> = job.capture(other, || {
            let group = job.try_group("world", &[])?;
            let before = pinned();
            for placed in &placed {
                case.launch(&group, placed, job.stream_address(), None)?;
                job.synchronize();
            }
            let again = pinned() - before;
            rank.barrier("called");
            group.end();
            Ok(again)
        });
        assert_eq!(job.control.calls("spoilt capture"), 0);
        assert_eq!(again, Ok(1), "memory pinned");
        for placed in &placed {
            case.check(&job, placed);
        }
        job.end_stream(other);
        rank.barrier("over");
        job.end();
    });
}

/// Whether a call is over may be asked at any time, also while another thread captures.
#[test]
fn asking_for_a_call_leaves_a_capture_alone() {
    let nodes = &[2];
    children("graphs::asking_for_a_call_leaves_a_capture_alone", nodes, &[]).run(|rank| {
        let job = Job::start(rank, nodes);
        let group = job.group("world", &[]);
        let case = Case::of(Collective::AllReduce, DType::F32, 100, 0, &job);
        let (placed, started) = case.begin(&job, &group).unwrap();
        job.synchronize();
        let other = job.new_stream();
        let asked = job.capture(other, || {
            (started.past().is_done(), group.device.wait(&started, Duration::from_secs(20)))
        });
        assert_eq!(asked, (Ok(true), Ok(())));
        assert_eq!(job.control.calls("spoilt capture"), 0);
        drop(started);
        case.check(&job, &placed);
        job.end_stream(other);
        rank.barrier("over");
        group.end();
        job.end();
    });
}
