//! What streams hold: how much of it, in which order the device may take it, and what is left in them.

use std::time::Duration;

use smddp::{Collective, DType, Error};

use crate::failures::{sum, told};
use crate::job::{Job, children};
use crate::reference::Case;
use crate::watch::{FOR_EVER, until};

const NODES: &[usize] = &[1, 1];
const SLOTS: [(&str, &str); 2] = [("SMDDP_CUDA_SLOT", "64K"), ("SMDDP_CUDA_SLOTS", "4")];
/// As deep as drivers are said to be; a piece of a call takes a few places.
const DEPTH: (&str, &str) = ("SMDDP_STANDIN_QUEUE_DEPTH", "1000");
/// Of more pieces than that has room for: half of a slot holds 8192 elements.
const LARGE: usize = 400 * 8192;
/// Pieces that are under way at once.
const UNDER_WAY: u64 = 192;

/// Rows that are evenly spaced are one operation.
#[test]
fn rows_are_copied_by_one_call() {
    let nodes = &[1, 1, 1];
    children("queues::rows_are_copied_by_one_call", nodes, &[("SMDDP_STANDIN_POISON", "start")]).run(
        |rank| {
            let job = Job::start(rank, nodes);
            let group = job.group("world", &SLOTS);
            let counted = || {
                ["cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpy2DAsync_v2"]
                    .map(|name| job.control.calls(name))
            };
            // In three pieces, and in one, whose rows follow one another.
            for (count, made_of) in [(7000, [0, 0, 6]), (1000, [1, 1, 0])] {
                let case = Case::of(Collective::AllToAll, DType::F32, count, 0, &job);
                let placed = case.place(&job);
                let before = counted();
                case.launch(&group, &placed, job.stream_address(), None).unwrap();
                let now = counted();
                let difference: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
                assert_eq!(difference, made_of, "{count} elements");
                case.check(&job, &placed);
            }
            rank.barrier("over");
            group.end();
            job.end();
        },
    );
}

/// Who enqueues more than a stream holds would wait inside the driver, with locks of it.
#[test]
fn a_call_of_more_pieces_than_a_stream_holds_waits_outside_of_the_driver() {
    let test = "queues::a_call_of_more_pieces_than_a_stream_holds_waits_outside_of_the_driver";
    children(test, NODES, &[DEPTH]).run(|rank| {
        let job = Job::start(rank, NODES);
        let group = job.group("world", &SLOTS);
        let case = sum(&job, LARGE);
        let placed = case.place(&job);
        job.synchronize();
        let (control, context, stream) = (&job.control, job.context(), job.stream_address());
        let written = control.calls("cuStreamWriteValue32_v2");
        let hold = job.hold();
        std::thread::scope(|scope| {
            let call = scope.spawn(|| {
                crate::job::enter(&job.driver, context);
                case.launch(&group, &placed, stream, None).map(|_| ())
            });
            let enqueued = || control.calls("cuStreamWriteValue32_v2") - written;
            assert!(until(|| enqueued() >= UNDER_WAY), "{} pieces", enqueued());
            // Time for one that would go on.
            std::thread::sleep(Duration::from_millis(300));
            hold.release();
            call.join().unwrap().unwrap();
        });
        assert_eq!(job.control.calls("full queue"), 0, "the host waited inside the driver");
        case.check(&job, &placed);
        rank.barrier("over");
        group.end();
        assert_eq!(job.control.lasting_error(), None);
    });
}

#[test]
fn a_call_that_waits_for_room_hears_of_an_abort() {
    let more = [DEPTH, FOR_EVER[0], FOR_EVER[1]];
    children("queues::a_call_that_waits_for_room_hears_of_an_abort", NODES, &more).run(|rank| {
        let job = Job::start(rank, NODES);
        let group = job.group("world", &SLOTS);
        let case = sum(&job, LARGE);
        let placed = case.place(&job);
        job.synchronize();
        if rank.rank == 0 {
            let (control, context, stream) = (&job.control, job.context(), job.stream_address());
            let written = control.calls("cuStreamWriteValue32_v2");
            std::thread::scope(|scope| {
                let call = scope.spawn(|| {
                    crate::job::enter(&job.driver, context);
                    // The last pieces may just have been enqueued.
                    case.launch(&group, &placed, stream, None).map_or_else(Some, |started| started.error())
                });
                let enqueued = || control.calls("cuStreamWriteValue32_v2") - written;
                assert!(until(|| enqueued() >= UNDER_WAY), "{} pieces", enqueued());
                group.device.abort("a test");
                let error = call.join().unwrap();
                assert!(matches!(error, Some(Error::Aborted { .. })), "{error:?}");
            });
            assert!(job.comes_to_rest(), "the stream still waits");
        }
        rank.barrier("aborted");
        told(&job, &group);
        rank.barrier("over");
    });
}

/// The device takes what streams and events let it take, waits for words first: it knows nothing of what those order.
#[test]
fn collectives_where_one_queue_takes_all_streams_in_any_order() {
    let test = "queues::collectives_where_one_queue_takes_all_streams_in_any_order";
    children(test, NODES, &[("SMDDP_STANDIN_ONE_QUEUE", "any")]).run(|rank| {
        let job = Job::start(rank, NODES);
        // Words are tried for half of it.
        let group = job.group_within("world", &SLOTS, Duration::from_secs(20)).unwrap();
        group.device.set_timeout(Duration::from_secs(60));
        assert!(!group.device.describe().contains("host waits"), "{}", group.device.describe());
        for collective in Collective::MOVING {
            let case = Case::of(collective, DType::F32, 70_000, 1, &job);
            case.run(&job, &group);
        }
        let uneven = Case::uneven_exchange(5000, &job);
        uneven.run(&job, &group);
        rank.barrier("over");
        group.end();
        job.end();
    });
}

/// What was tried of the words waits in a stream, which calls must not come behind; a stream's own store ends it.
#[test]
fn collectives_where_streams_see_nothing_of_the_hosts_words() {
    let test = "queues::collectives_where_streams_see_nothing_of_the_hosts_words";
    children(test, NODES, &[("SMDDP_STANDIN_WAIT_VALUE", "never"), FOR_EVER[1]]).run(|rank| {
        let job = Job::start(rank, NODES);
        // Words are tried for half of it.
        let group = job.group_within("world", &SLOTS, Duration::from_secs(10)).unwrap();
        group.device.set_timeout(Duration::from_secs(60));
        assert!(group.device.describe().contains("host waits"), "{}", group.device.describe());
        assert!(until(|| job.control.parked() == 0), "a stream still waits for a word");
        let case = sum(&job, 70_000);
        let placed = case.start(&job, &group);
        assert!(job.comes_to_rest(), "the stream still waits");
        case.check(&job, &placed);
        rank.barrier("over");
        group.end();
        assert_eq!(job.control.lasting_error(), None);
    });
}
