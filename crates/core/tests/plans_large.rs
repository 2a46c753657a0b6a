//! Plans of more than four gigabytes: no 32 bits anywhere on the way. Nothing is moved, and no memory taken.

#![allow(clippy::unwrap_used)]

use smddp_core::plan::{Buf, Op, Plan, Span, Who};
use smddp_core::plan::{CallShape, Override, Tuning, candidates, schedule};
use smddp_core::{Collective, GroupShape};

/// What a plan writes and reads, on behalf of local rank `local`.
fn touched(plan: &Plan, local: u32) -> (Vec<Span>, Vec<Span>) {
    let (mut written, mut read) = (Vec::new(), Vec::new());
    let includes = |who: Who| who == Who::All || who == Who::One(local);
    for step in &plan.steps {
        match &step.op {
            Op::Phase(moves) => {
                written.extend(moves.iter().filter(|m| includes(m.to)).map(|m| m.dst));
                read.extend(moves.iter().filter(|m| includes(m.from)).map(|m| m.src));
            }
            Op::Send { src, .. } => read.push(*src),
            Op::Recv { dst, .. } => written.push(*dst),
            Op::Reduce { dst, srcs, .. } => {
                written.push(*dst);
                read.extend(srcs);
            }
            Op::Copy { dst, src } => {
                written.push(*dst);
                read.push(*src);
            }
        }
    }
    (written, read)
}

/// The bytes of `spans` in `buf` as ranges without gaps, in order.
fn joined(spans: &[Span], buf: Buf) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(usize, usize)> =
        spans.iter().filter(|s| s.buf == buf && s.len > 0).map(|s| (s.off, s.off + s.len)).collect();
    ranges.sort_unstable();
    let mut joined: Vec<(usize, usize)> = Vec::new();
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

/// Bytes of the (input, output) of `rank` of a call with `len` bytes, or blocks of so many, rooted at rank 0.
fn buffers(collective: Collective, rank: usize, size: usize, len: usize) -> (usize, usize) {
    let at_root = |bytes: usize| if rank == 0 { bytes } else { 0 };
    match collective {
        Collective::AllGather => (len, size * len),
        Collective::ReduceScatter => (size * len, len),
        Collective::AllToAll => (size * len, size * len),
        Collective::Gather => (len, at_root(size * len)),
        Collective::Scatter => (at_root(size * len), len),
        _ => (len, len),
    }
}

#[test]
fn every_byte_beyond_four_gigabytes_has_its_place() {
    let shapes = [
        GroupShape::even(1, 3),
        GroupShape::even(2, 2),
        GroupShape::even(3, 1),
        GroupShape::even(5, 1),
        GroupShape::uneven(&[3, 1, 2]),
    ];
    for shape in &shapes {
        for collective in Collective::MOVING {
            for algorithm in candidates(collective, shape.node_count()) {
                for count in [(1 << 31) - 1, 1 << 31, (1 << 31) + 3, 5 << 29] {
                    let overrides = Override::parse_all(&format!("{collective}={algorithm}")).unwrap();
                    let tuning = Tuning { overrides, ..Tuning::default() };
                    let call = CallShape::new(collective, 2, count);
                    for rank in 0..shape.size() {
                        let place = format!("{collective} by {algorithm} on {shape}, {count}, rank {rank}");
                        check(shape, rank, &call, &tuning, &place);
                    }
                }
            }
        }
    }
}

fn check(shape: &GroupShape, rank: usize, call: &CallShape, tuning: &Tuning, place: &str) {
    let schedule = schedule(shape, rank, call, tuning).unwrap();
    let local = shape.local_of(rank) as u32;
    let (input, output) = buffers(call.collective, rank, shape.size(), call.count * call.elem);
    // Whoever gives what it has, or gets nothing, writes nothing.
    let writes = match call.collective {
        Collective::Reduce | Collective::Gather => rank == 0,
        Collective::Broadcast => rank != 0,
        _ => true,
    };
    let before_tail = schedule.full_rounds * schedule.round_bytes;
    let mut end = 0;
    let tail = schedule.tail.as_ref().map(|tail| (tail, before_tail));
    let full = [(&schedule.body, 0), (&schedule.body, before_tail - schedule.round_bytes)];
    for (plan, shift) in full.into_iter().chain(tail) {
        let (written, read) = touched(plan, local);
        for span in written.iter().chain(&read) {
            let limit = match span.buf {
                Buf::Input => input.checked_sub(shift),
                Buf::Output => output.checked_sub(shift),
                Buf::Scratch => Some(plan.scratch),
            };
            let fits = span.off.checked_add(span.len).zip(limit).is_some_and(|(end, limit)| end <= limit);
            assert!(fits || span.len == 0, "{place}: {span:?}, moved on by {shift}");
        }
        let ranges = joined(&written, Buf::Output);
        if writes {
            let [(0, len)] = ranges[..] else { panic!("{place}: its round writes {ranges:?}") };
            // Full rounds follow one another without gaps.
            assert!(len == schedule.round_bytes || shift + len == output, "{place}: {len} bytes at {shift}");
            end = shift + len;
        }
        // What a rank gives apart from its result is all of it, each block as far as the round goes.
        if !matches!(call.collective, Collective::AllReduce | Collective::Reduce | Collective::Broadcast) {
            let block = call.count * call.elem;
            let far = ranges.first().map_or(block, |range| range.1.min(block));
            let all: Vec<Span> = (0..input / block).map(|at| Span::input(at * block, far)).collect();
            assert_eq!(joined(&read, Buf::Input), joined(&all, Buf::Input), "{place}: reads, at {shift}");
        }
    }
    if writes {
        assert_eq!(end, output, "{place}");
    }
    assert!(schedule.scratch_stride() * schedule.window <= tuning.scratch(), "{place}");
}
