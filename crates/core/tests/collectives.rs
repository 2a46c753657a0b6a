//! Every collective through communicator, engine and interpreter, ranks as threads over plain memory that delivers in
//! seeded order.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::{Group, groups, groups_over, on_all, seated};
use smddp_core::engine::op::GroupKey;
use smddp_core::gate::{Gate, Words};
use smddp_core::plan::Tuning;
use smddp_core::request::Request;
use smddp_core::{Collective, DType, Error, GroupShape, ReduceOp, Region};

fn shapes() -> Vec<GroupShape> {
    vec![
        GroupShape::even(1, 1),
        GroupShape::even(1, 3),
        GroupShape::even(3, 1),
        GroupShape::even(2, 2),
        GroupShape::uneven(&[2, 1]),
        GroupShape::from_labels(&[0, 1, 0, 1, 1]),
    ]
}

fn small_rounds() -> Tuning {
    Tuning { chunk: 256, ..Tuning::default() }
}

fn value(rank: usize, i: usize) -> i64 {
    (i % 13) as i64 * 3 + rank as i64 + 1
}

/// Calls `f` for every shape, tuning and count, on every rank.
fn everywhere(seed: u64, counts: &[usize], f: impl Fn(&Group, usize) + Sync) {
    for (i, shape) in shapes().iter().enumerate() {
        for tuning in [Tuning::default(), small_rounds()] {
            let groups = groups(shape, seed + i as u64, &tuning);
            for &count in counts {
                on_all(&groups, |g| f(g, count));
            }
        }
    }
}

#[test]
fn reductions_equal_the_single_process_result() {
    everywhere(1, &[0, 1, 5, 1000], |g, count| {
        let (n, me, shape) = (g.size(), g.rank(), g.shape());
        let sum = |i: usize| (0..n).map(|r| value(r, i)).sum::<i64>();
        let mut a: Vec<i64> = (0..count).map(|i| value(me, i)).collect();
        g.all_reduce(&mut a, ReduceOp::Sum).unwrap();
        assert!(a.iter().enumerate().all(|(i, &v)| v == sum(i)), "all_reduce on {shape}");

        let root = n / 2;
        let mut b: Vec<f64> = (0..count).map(|i| value(me, i) as f64).collect();
        g.reduce(&mut b, root, ReduceOp::Avg).unwrap();
        for (i, &v) in b.iter().enumerate() {
            let want = if me == root { sum(i) as f64 / n as f64 } else { value(me, i) as f64 };
            assert_eq!(v, want, "reduce on {shape}");
        }

        let input: Vec<i64> = (0..count * n).map(|i| value(me, i)).collect();
        let mut out = vec![0i64; count];
        g.reduce_scatter(&input, &mut out, ReduceOp::Max).unwrap();
        let want = |i: usize| value(n - 1, me * count + i);
        assert!(out.iter().enumerate().all(|(i, &v)| v == want(i)), "reduce_scatter on {shape}");
        assert!(input.iter().enumerate().all(|(i, &v)| v == value(me, i)), "input clobbered");
    });
}

#[test]
fn calls_whose_peers_are_late_go_on_where_their_callers_stopped() {
    let groups = groups(&GroupShape::even(1, 3), 11, &Tuning::default());
    on_all(&groups, |g| {
        for call in 0..300 {
            let mut a: Vec<i64> = (0..9).map(|i| value(g.rank(), i + call)).collect();
            g.all_reduce(&mut a, ReduceOp::Sum).unwrap();
            let sum = |i: usize| (0..3).map(|r| value(r, i + call)).sum::<i64>();
            assert!(a.iter().enumerate().all(|(i, &v)| v == sum(i)), "call {call}: {a:?}");
        }
    });
}

/// Peers would ring for it at every call.
#[test]
fn who_falls_asleep_and_finds_its_work_done_takes_the_announcement_back() {
    let shape = GroupShape::even(1, 2);
    let groups = groups_over(&shape, 5, &Tuning::default(), |node| node.slow_to_tell());
    on_all(&groups, |g| {
        for i in 0..20 {
            let mut data = [value(g.rank(), i)];
            g.all_reduce(&mut data, ReduceOp::Sum).unwrap();
            assert_eq!(data, [value(0, i) + value(1, i)]);
        }
    });
}

#[test]
fn movements_put_every_element_where_it_belongs() {
    everywhere(100, &[0, 1, 5, 700], |g, count| {
        let (n, me, shape) = (g.size(), g.rank(), g.shape());
        let own: Vec<i64> = (0..count).map(|i| value(me, i)).collect();
        let gathered = |v: &[i64]| (0..n * count).all(|k| v[k] == value(k / count, k % count));
        let mut all = vec![0i64; n * count];
        g.all_gather(&own, &mut all).unwrap();
        assert!(gathered(&all), "all_gather on {shape}");

        let root = n - 1;
        let mut at_root = vec![0i64; if me == root { n * count } else { 0 }];
        g.gather(&own, (me == root).then_some(&mut at_root[..]), root).unwrap();
        assert!(me != root || gathered(&at_root), "gather on {shape}");

        let mut mine = vec![0i64; count];
        g.scatter((me == root).then_some(&at_root[..]), &mut mine, root).unwrap();
        assert_eq!(mine, own, "scatter on {shape}");

        let mut b = if me == 0 { own.clone() } else { vec![0; count] };
        g.broadcast(&mut b, 0).unwrap();
        assert!(b.iter().enumerate().all(|(i, &v)| v == value(0, i)), "broadcast on {shape}");

        let input: Vec<i64> = (0..n * count).map(|k| value(me * 10 + k / count, k % count)).collect();
        let mut out = vec![0i64; n * count];
        g.all_to_all(&input, &mut out).unwrap();
        let want = |k: usize| value(k / count * 10 + me, k % count);
        assert!((0..n * count).all(|k| out[k] == want(k)), "all_to_all on {shape}");
        g.barrier().unwrap();
    });
}

#[test]
fn uneven_blocks_arrive_whole() {
    everywhere(200, &[0, 1, 40], |g, scale| {
        let (n, me, shape) = (g.size(), g.rank(), g.shape());
        let send: Vec<usize> = (0..n).map(|to| (me + 2 * to) % 4 * scale).collect();
        let recv: Vec<usize> = (0..n).map(|from| (from + 2 * me) % 4 * scale).collect();
        let blocks = |k: &[usize], v: &dyn Fn(usize) -> usize| -> Vec<i64> {
            k.iter().enumerate().flat_map(|(r, &k)| vec![v(r) as i64; k]).collect()
        };
        let input = blocks(&send, &|to| me * 100 + to);
        let mut out = vec![0i64; recv.iter().sum()];
        g.all_to_all_uneven(&input, &send, &mut out, &recv).unwrap();
        assert_eq!(out, blocks(&recv, &|from| from * 100 + me), "all_to_all on {shape}");

        let counts: Vec<usize> = (0..n).map(|r| (r % 3) * scale).collect();
        let mut own = vec![me as i64; counts[me]];
        let mut all = vec![-1i64; counts.iter().sum()];
        // SAFETY: the buffers outlive the blocking calls.
        let run = |collective, input: &mut [i64], output: &mut [i64]| unsafe {
            let (from, to) = (Region::of(input), Region::of(output));
            let request = Request::new(collective, DType::I64, 0, from, to);
            g.run(&Request { counts: Some(counts.clone().into()), ..request }).unwrap();
        };
        run(Collective::AllGather, &mut own, &mut all);
        assert_eq!(all, blocks(&counts, &|r| r), "all_gather on {shape}");
        run(Collective::ReduceScatter, &mut all, &mut own);
        assert!(own.iter().all(|&v| v == (me * n) as i64), "reduce_scatter on {shape}");
    });
}

/// A call of `collective` on parts (start, end) of one buffer.
fn within(
    g: &Group,
    collective: Collective,
    counts: Option<&[usize]>,
    all: &mut [i64],
    (input, output): ((usize, usize), (usize, usize)),
) -> Result<(), Error> {
    // SAFETY: the buffer outlives the blocking call.
    let whole = unsafe { Region::of(all) };
    let part = |(start, end): (usize, usize)| whole.slice(start * 8, (end - start) * 8);
    let shorter = (input.1 - input.0).min(output.1 - output.0);
    let count = match (counts, collective) {
        (Some(_), _) => 0,
        (None, Collective::AllToAll) => shorter / g.size(),
        (None, _) => shorter,
    };
    let request = Request::new(collective, DType::I64, count, part(input), part(output));
    // SAFETY: as above.
    unsafe { g.run(&Request { counts: counts.map(Into::into), ..request }) }
}

#[test]
fn the_own_block_may_be_part_of_the_whole_and_nothing_else_may() {
    everywhere(300, &[1, 40], |g, scale| {
        let (n, me, shape) = (g.size(), g.rank(), g.shape());
        let uneven: Vec<usize> = (0..n).map(|r| (r % 3 + 1) * scale).collect();
        for counts in [None, Some(&uneven[..])] {
            let lengths = counts.map_or_else(|| vec![scale; n], <[usize]>::to_vec);
            let start: usize = lengths[..me].iter().sum();
            let (own, all) = ((start, start + lengths[me]), (0, lengths.iter().sum::<usize>()));
            let owner = |i: usize| (0..n).find(|&r| i < lengths[..=r].iter().sum()).unwrap();

            let mut data: Vec<i64> = (0..all.1).map(|i| if owner(i) == me { i as i64 } else { -1 }).collect();
            within(g, Collective::AllGather, counts, &mut data, (own, all)).unwrap();
            assert!(data.iter().enumerate().all(|(i, &v)| v == i as i64), "all_gather on {shape}: {data:?}");

            let mut data: Vec<i64> = (0..all.1).map(|i| value(me, i)).collect();
            within(g, Collective::ReduceScatter, counts, &mut data, (all, own)).unwrap();
            let sum = |i: usize| (0..n).map(|r| value(r, i)).sum::<i64>();
            assert!((own.0..own.1).all(|i| data[i] == sum(i)), "reduce_scatter on {shape}: {data:?}");

            // One element further, as long as that is within the whole: refused, and the group goes on.
            let moved = (own.0 + 1, own.1 + 1);
            let calls = [(Collective::AllGather, (moved, all)), (Collective::ReduceScatter, (all, moved))];
            for (collective, places) in calls.into_iter().filter(|_| moved.0 < all.1) {
                let refused = within(g, collective, counts, &mut vec![0; all.1 + 1], places);
                let named = matches!(&refused, Err(Error::Argument { argument: "input", .. }));
                assert!(named, "{collective} on {shape}: {refused:?}");
            }
        }
        let whole = (0, n * scale);
        let swapped = within(g, Collective::AllToAll, None, &mut vec![1; n * scale], (whole, whole));
        assert_eq!(swapped.is_ok(), n == 1, "all_to_all on {shape}: {swapped:?}");
    });
}

#[test]
fn messages_match_by_tag_whatever_the_order() {
    let groups = groups(&GroupShape::uneven(&[2, 1]), 3, &Tuning::default());
    on_all(&groups, |g| {
        let (next, previous) = ((g.rank() + 1) % 3, (g.rank() + 2) % 3);
        std::thread::scope(|scope| {
            for tag in 0..4u64 {
                scope.spawn(move || g.send(&[g.rank() as i32, tag as i32], next, tag).unwrap());
            }
            for tag in (0..4u64).rev() {
                let mut got = [0i32; 2];
                g.recv(&mut got, previous, tag).unwrap();
                assert_eq!(got, [previous as i32, tag as i32]);
            }
        });
    });
}

/// What needs no peer takes no other thread: but for the moments in which the progress thread listens to the fabric, and here
/// there is none.
#[test]
fn a_message_that_is_awaited_is_sent_when_its_start_returns() {
    let groups = groups(&GroupShape::even(1, 2), 3, &Tuning::default());
    for round in 0..100u64 {
        let (mut sent, mut got) = ([round], [0u64]);
        // SAFETY: both messages are waited for before their memory goes.
        let (to, from) = unsafe { (Region::of(&mut sent), Region::of(&mut got)) };
        // SAFETY: as above.
        let received = unsafe { groups[1].start_recv(0, 0, DType::I64, from).unwrap() };
        // SAFETY: as above.
        let sent = unsafe { groups[0].start_send(1, 0, DType::I64, to).unwrap() };
        assert!(sent.is_done(), "round {round}");
        sent.wait(None).unwrap();
        received.wait(None).unwrap();
        assert_eq!(got, [round]);
    }
}

/// A receive whose message has come is over when its start returns, without an operation: its handle is as any other's.
#[test]
fn a_message_that_has_come_is_received_when_its_start_returns() {
    let groups = groups(&GroupShape::even(1, 2), 3, &Tuning::default());
    let (mut sent, mut got) = ([7u64], [0u64]);
    // SAFETY: both messages are waited for before their memory goes.
    let (to, from) = unsafe { (Region::of(&mut sent), Region::of(&mut got)) };
    // SAFETY: as above.
    let sent = unsafe { groups[0].start_send(1, 0, DType::I64, to).unwrap() };
    assert!(!sent.is_done());
    // SAFETY: as above.
    let received = unsafe { groups[1].start_recv(0, 0, DType::I64, from).unwrap() };
    assert_eq!((received.is_done(), received.source(), got), (true, Some(0), [7]));
    let (tell, told) = std::sync::mpsc::channel();
    received.on_done(Box::new(|_| panic!("as it happens")));
    received.clone().on_done(Box::new(move |result| tell.send(result.clone()).unwrap()));
    told.try_recv().unwrap().unwrap();
    received.set_timeout(Duration::ZERO);
    received.result().unwrap().unwrap();
    received.wait(Some(Duration::ZERO)).unwrap();
    sent.wait(None).unwrap();
}

#[test]
fn messages_both_ways_at_once_cross() {
    let groups = groups(&GroupShape::uneven(&[3, 1]), 3, &Tuning::default());
    on_all(&groups, |g| {
        let (next, previous) = ((g.rank() + 1) % 4, (g.rank() + 3) % 4);
        for len in [0, 1, 1000] {
            let (data, mut got) = (vec![g.rank() as i32; len], vec![-1; len]);
            g.sendrecv(&data, next, &mut got, previous, 0).unwrap();
            assert_eq!(got, vec![previous as i32; len]);
        }
        // What cannot be received is known before anything is sent.
        let error = g.sendrecv(&[1], next, &mut [0], 4, 0).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "from", .. }), "{error}");
    });
}

/// The progress thread moves it, however brief; here it alone calls back.
#[test]
fn what_nobody_waits_for_is_done_all_the_same() {
    let groups = groups(&GroupShape::even(1, 2), 3, &Tuning::default());
    let mut got = vec![0u8; 2 << 20];
    for len in [1, 1 << 20, 2 << 20] {
        let (send, done) = std::sync::mpsc::channel();
        // SAFETY: its end is waited for below.
        let received = unsafe { groups[1].start_recv(0, 0, DType::U8, Region::of(&mut got[..len])).unwrap() };
        received.on_done(Box::new(move |r| send.send(r.is_ok()).unwrap()));
        groups[0].send(&vec![7u8; len], 1, 0).unwrap();
        assert!(done.recv_timeout(Duration::from_secs(20)).unwrap(), "{len} bytes");
        assert!(got[..len].iter().all(|&byte| byte == 7));
    }
}

#[test]
fn a_receive_from_any_rank_takes_whatever_comes() {
    let groups = groups(&GroupShape::uneven(&[2, 2]), 3, &Tuning::default());
    on_all(&groups, |g| {
        if g.rank() > 0 {
            for round in 0..3 {
                g.send(&[g.rank() as i32, round], 0, 4).unwrap();
            }
            return;
        }
        let mut last = [-1; 4];
        // One that names its sender keeps its message from the others: the first, if it was started first.
        let mut named = [0i32; 2];
        // SAFETY: the buffer outlives the wait below.
        let first = unsafe { g.start_recv(2, 4, DType::I32, Region::of(&mut named)).unwrap() };
        for _ in 0..8 {
            let mut got = [0i32; 2];
            let from = g.recv_any(&mut got, 4).unwrap();
            assert_eq!(got[0], from as i32);
            assert!(got[1] > last[from], "messages of rank {from} came out of order");
            last[from] = got[1];
        }
        first.wait(None).unwrap();
        assert_eq!((first.source(), named), (Some(2), [2, 0]));
        assert_eq!(last[1..], [2, 2, 2]);
    });
}

#[test]
fn a_receive_from_any_rank_that_comes_to_nothing_names_all() {
    let groups = groups(&GroupShape::uneven(&[2, 1]), 3, &Tuning::default());
    groups[0].set_timeout(Duration::from_millis(200));
    let error = groups[0].recv_any(&mut [0u8; 3], 0).unwrap_err();
    assert!(matches!(&error, Error::Timeout { missing, .. } if missing == &[1, 2]), "{error}");
}

#[test]
fn many_operations_in_flight_all_complete() {
    let groups = groups(&GroupShape::even(2, 2), 5, &small_rounds());
    on_all(&groups, |g| {
        let mut buffers: Vec<Vec<f32>> = (0..20).map(|k| vec![k as f32; 300]).collect();
        // SAFETY: the buffers outlive the waits below.
        let start = |b: &mut Vec<f32>| unsafe {
            let region = Region::of(b);
            g.start(&Request::new(Collective::AllReduce, DType::F32, 300, region, region)).unwrap()
        };
        let handles: Vec<_> = buffers.iter_mut().map(start).collect();
        let (send, receive) = std::sync::mpsc::channel();
        handles[7].on_done(Box::new(move |r| send.send(r.is_ok()).unwrap()));
        for handle in handles.iter().rev() {
            handle.wait(None).unwrap();
        }
        assert!(receive.recv_timeout(Duration::from_secs(20)).unwrap());
        assert!(buffers.iter().enumerate().all(|(k, b)| b.iter().all(|&v| v == 4.0 * k as f32)));
    });
}

#[test]
fn a_call_that_differs_is_an_error_on_every_rank() {
    let groups = groups(&GroupShape::even(1, 3), 6, &Tuning::default());
    let errors = on_all(&groups, |g| {
        let mut a = vec![1f32; if g.rank() == 1 { 10 } else { 11 }];
        g.all_reduce(&mut a, ReduceOp::Sum).unwrap_err()
    });
    assert!(errors.iter().any(|e| matches!(e, Error::Mismatch { .. })), "{errors:?}");
    let text = format!("{errors:?}");
    assert!(text.contains("all_reduce(float32[10]") && text.contains("all_reduce(float32[11]"), "{text}");
    let later = on_all(&groups, |g| g.barrier().unwrap_err());
    assert!(later.iter().all(|e| matches!(e, Error::Aborted { .. })), "{later:?}");
}

#[test]
fn calls_without_elements_need_no_order() {
    for shape in [GroupShape::even(1, 2), GroupShape::even(2, 2), GroupShape::uneven(&[2, 1])] {
        let groups = groups(&shape, 10, &Tuning::default());
        on_all(&groups, |g| {
            g.set_timeout(Duration::from_secs(5));
            let mut full = [1f32; 4];
            for turn in 0..6 {
                // Each rank at another place.
                if g.rank() == turn % g.size() {
                    g.all_reduce::<f32>(&mut [], ReduceOp::Sum).unwrap();
                }
                g.all_reduce(&mut full, ReduceOp::Sum).unwrap();
            }
            assert_eq!(full, [(g.size() as f32).powi(6); 4]);
        });
    }
}

#[test]
fn a_call_without_elements_where_others_have_some_is_told_at_the_next_call() {
    let groups = groups(&GroupShape::even(2, 1), 11, &Tuning::default());
    let results = on_all(&groups, |g| {
        g.set_timeout(Duration::from_secs(20));
        let mut a = vec![1f32; if g.rank() == 1 { 0 } else { 5 }];
        g.all_reduce(&mut a, ReduceOp::Sum).and_then(|()| g.all_reduce(&mut [1f32; 3], ReduceOp::Sum))
    });
    assert!(results.iter().all(Result::is_err), "{results:?}");
    assert!(results.iter().any(|r| matches!(r, Err(Error::Mismatch { .. }))), "{results:?}");
}

#[test]
fn a_rank_that_stays_away_is_named_by_the_timeout() {
    for shape in [GroupShape::even(1, 3), GroupShape::even(3, 1)] {
        let groups = groups(&shape, 8, &Tuning::default());
        let results = on_all(&groups, |g| {
            g.set_timeout(Duration::from_millis(300));
            if g.rank() == 2 { Ok(()) } else { g.all_reduce(&mut [1f32; 4], ReduceOp::Sum) }
        });
        let names = |e: &Error| matches!(e, Error::Timeout { missing, .. } if missing.contains(&2));
        assert!(results.iter().filter_map(|r| r.as_ref().err()).any(names), "{results:?}");
        assert!(results[0].is_err() && results[1].is_err(), "{results:?}");
    }
}

#[test]
fn abort_frees_every_waiter() {
    let groups = groups(&GroupShape::even(2, 2), 9, &Tuning::default());
    let results = on_all(&groups, |g| {
        if g.rank() == 3 {
            std::thread::sleep(Duration::from_millis(50));
            g.abort("the user pressed a button");
            return Ok(());
        }
        g.all_reduce(&mut [1f32; 4], ReduceOp::Sum)
    });
    for result in &results[..3] {
        let text = result.as_ref().unwrap_err().to_string();
        assert!(text.contains("the user pressed a button"), "{text}");
    }
}

#[test]
fn wrong_arguments_are_refused_before_anything_moves() {
    let groups = groups(&GroupShape::even(1, 1), 10, &Tuning::default());
    let g = &groups[0];
    let text = g.reduce_scatter(&[1f32; 3], &mut [0f32; 2], ReduceOp::Sum).unwrap_err().to_string();
    assert!(text.contains("'input'") && text.contains("12 bytes"), "{text}");
    let text = g.all_reduce(&mut [1f32], ReduceOp::BitXor).unwrap_err().to_string();
    assert!(text.contains("bxor") && text.contains("float32"), "{text}");
    let text = g.broadcast(&mut [1f32], 1).unwrap_err().to_string();
    assert!(text.contains("'root'"), "{text}");
    let text = g.all_to_all_uneven(&[1f32, 2.0], &[1, 1], &mut [0f32; 3], &[2, 1]).unwrap_err().to_string();
    assert!(text.contains("to itself"), "{text}");
    let text = g.send(&[1f32], 0, 0).unwrap_err().to_string();
    assert!(text.contains("another rank"), "{text}");
    g.barrier().unwrap();
}

#[test]
fn a_callback_may_wait_for_a_later_operation() {
    let groups = groups(&GroupShape::even(2, 1), 11, &Tuning::default());
    on_all(&groups, |g| {
        let (send, receive) = std::sync::mpsc::channel();
        let (mut first, mut second) = (vec![1f32; 8], vec![2f32; 8]);
        // SAFETY: both buffers outlive the receive below, which comes after the last operation.
        let start = |b: &mut Vec<f32>| unsafe {
            let region = Region::of(b);
            g.start(&Request::new(Collective::AllReduce, DType::F32, 8, region, region)).unwrap()
        };
        let one = start(&mut first);
        let two = start(&mut second);
        one.on_done(Box::new(move |_| {
            // As torch's futures do it: blocked until the callback of the other has run, without helping.
            let (inner, outer) = std::sync::mpsc::channel();
            two.on_done(Box::new(move |r| inner.send(r.is_ok()).unwrap()));
            send.send(outer.recv_timeout(Duration::from_secs(20)).unwrap()).unwrap();
        }));
        assert!(receive.recv_timeout(Duration::from_secs(30)).unwrap());
        one.wait(None).unwrap();
    });
    for g in &groups {
        g.shutdown();
    }
}

/// The request of an in-place sum of `data` that waits for `gate`.
fn gated(data: &mut [i64], gate: &Gate) -> Request {
    // SAFETY: the tests below keep `data` until the operation is over.
    let region = unsafe { Region::of(data) };
    Request {
        gate: Some(gate.clone()),
        ..Request::new(Collective::AllReduce, DType::I64, data.len(), region, region)
    }
}

#[test]
fn a_gated_call_begins_when_its_word_is_written_and_says_when_it_is_over() {
    for shape in shapes() {
        let groups = groups(&shape, 3, &small_rounds());
        let sum = (1..=shape.size() as i64).sum::<i64>();
        on_all(&groups, |g| {
            let words = Arc::new(Words::new().unwrap());
            let mut data: Vec<Vec<i64>> = (0..3).map(|_| vec![0; 100]).collect();
            let gates: Vec<Gate> =
                (0..3).map(|slot| Gate { words: Arc::clone(&words), slot, value: 1 }).collect();
            let handles: Vec<_> = data
                .iter_mut()
                .zip(&gates)
                // SAFETY: `data` outlives the waits below.
                .map(|(d, gate)| unsafe { g.start(&gated(d, gate)) }.unwrap())
                .collect();
            let mut behind = vec![g.rank() as i64 + 1; 10];
            for at in 0..3 {
                std::thread::sleep(Duration::from_millis(3));
                assert!(!handles[at].is_done(), "it did not wait for its gate");
                assert_eq!(words.done(at).load(Ordering::Acquire), 0);
                data[at].fill(g.rank() as i64 + 1);
                words.ready(at).store(1, Ordering::Release);
                handles[at].wait(None).unwrap();
                assert_eq!(words.done(at).load(Ordering::Acquire), 1);
                assert_eq!(data[at], vec![sum; 100]);
            }
            g.all_reduce(&mut behind, ReduceOp::Sum).unwrap();
            assert_eq!(behind, vec![sum; 10]);
        });
    }
}

#[test]
fn a_failed_group_releases_whoever_waits_for_its_gated_calls() {
    let shape = GroupShape::even(2, 2);
    let groups = groups(&shape, 5, &small_rounds());
    on_all(&groups, |g| {
        let words = Arc::new(Words::new().unwrap());
        let mut data: Vec<Vec<i64>> = (0..2).map(|_| vec![1; 100]).collect();
        let gates: Vec<Gate> =
            (0..2).map(|slot| Gate { words: Arc::clone(&words), slot, value: 7 }).collect();
        let handles: Vec<_> = data
            .iter_mut()
            .zip(&gates)
            // SAFETY: `data` outlives the waits below.
            .map(|(d, gate)| unsafe { g.start(&gated(d, gate)) }.unwrap())
            .collect();
        if g.rank() == 2 {
            g.abort("a test");
        }
        // The device of rank 0 never comes to its second call; all are released nevertheless.
        words.ready(0).store(7, Ordering::Release);
        for (at, handle) in handles.iter().enumerate() {
            assert!(matches!(handle.wait(None), Err(Error::Aborted { .. })));
            assert_eq!(words.done(at).load(Ordering::Acquire), 7);
        }
    });
}

/// Who enqueues calls beside a driver that naps asks whether the group has failed, before each call.
#[test]
fn a_failure_is_known_and_a_call_starts_while_another_thread_drives() {
    const LIMIT: Duration = Duration::from_secs(20);
    let seats = seated(&GroupShape::even(1, 1), 9, &Tuning::default(), |node| node);
    let (engine, group) = &seats[0];
    let barrier = Request::new(Collective::Barrier, DType::U8, 0, Region::EMPTY, Region::EMPTY);
    // What is asked while another thread has the driver's seat; what it says, or nothing if it waits for the seat.
    let asked = |what: &(dyn Fn() -> Option<Error> + Sync)| {
        let (seated, is_seated) = mpsc::channel();
        let (leave, left) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                engine.with_local(GroupKey { index: 0, id: 7 }, |_| {
                    seated.send(()).unwrap();
                    // Left by whoever asks, or by nobody.
                    let _ = left.recv_timeout(LIMIT);
                    Ok(())
                })
            });
            is_seated.recv_timeout(LIMIT).unwrap();
            scope.spawn(move || tell.send(what()));
            let said = told.recv_timeout(LIMIT / 4);
            drop(leave);
            said.expect("it waits for who drives")
        })
    };
    assert_eq!(asked(&|| group.known_failure()), None);
    // SAFETY: without memory.
    assert_eq!(asked(&|| unsafe { group.start(&barrier) }.err()), None);
    group.abort("a test");
    assert!(matches!(asked(&|| group.known_failure()), Some(Error::Aborted { .. })));
    assert!(
        matches!(asked(&|| group.failure()), Some(Error::Aborted { .. })),
        "what is known is not asked again"
    );
}
