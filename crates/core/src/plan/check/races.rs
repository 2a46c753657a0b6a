//! What can be seen in one rank's schedule alone: order, bounds, tags, and bytes that unordered steps share.

use std::collections::HashSet;

use super::fault::Fault;
use super::world::World;
use crate::plan::data::{Buf, Op, Plan, Span, Who};

/// Bytes that a step touches. `item`: the move of a phase.
#[derive(Clone, Copy)]
struct Access {
    span: Span,
    step: usize,
    item: usize,
    write: bool,
}

impl Access {
    const fn end(&self) -> usize {
        self.span.off + self.span.len
    }
}

pub(super) fn check(world: &World, rank: usize) -> Result<(), Fault> {
    let schedule = &world.schedules[rank];
    let step_of = schedule.round_bytes;
    let plans = [
        (schedule.full_rounds > 0).then(|| (&schedule.body, (schedule.full_rounds - 1) * step_of)),
        schedule.tail.as_ref().map(|tail| (tail, schedule.full_rounds * step_of)),
    ];
    let mut touched = Vec::new();
    for (plan, shift) in plans.into_iter().flatten() {
        check_steps(world, rank, plan)?;
        let accesses = accesses(world, rank, plan);
        check_bounds(world, rank, plan, &accesses, shift)?;
        check_order(rank, plan, &accesses)?;
        touched.push(accesses);
    }
    check_rounds(world, rank, touched)
}

fn check_steps(world: &World, rank: usize, plan: &Plan) -> Result<(), Fault> {
    let mut tags = HashSet::new();
    for (step, s) in plan.steps.iter().enumerate() {
        if let Some(&on) = s.after.iter().find(|&&on| on as usize >= step) {
            return Err(Fault::Forward { rank, step, on: on as usize });
        }
        let malformed = |what: &str| Err(Fault::Malformed { rank, step, what: what.to_owned() });
        let message = match &s.op {
            Op::Send { to, tag, .. } => Some((*to, *tag, true)),
            Op::Recv { from, tag, .. } => Some((*from, *tag, false)),
            Op::Phase(moves) => {
                let locals = world.shape.local_size(rank);
                let here = |who: Who| !matches!(who, Who::One(l) if l as usize >= locals);
                if moves.iter().any(|m| m.src.len != m.dst.len || !here(m.from) || !here(m.to)) {
                    return malformed("a move between unequal lengths or beyond the node's ranks");
                }
                None
            }
            Op::Reduce { dst, srcs, .. } => {
                if srcs.is_empty() || srcs.iter().any(|s| s.len != dst.len) {
                    return malformed("a reduction of nothing or of unequal lengths");
                }
                None
            }
            Op::Copy { dst, src } if dst.len != src.len => {
                return malformed("a copy between unequal lengths");
            }
            Op::Copy { .. } => None,
        };
        if let Some((peer, tag, out)) = message {
            if peer as usize >= world.shape.size() || peer as usize == rank {
                return malformed("a message to no other rank of the group");
            }
            if !tags.insert((peer, tag, out)) {
                return Err(Fault::Tag { rank, step, peer: peer as usize, tag });
            }
        }
    }
    Ok(())
}

/// Every access of the plan's steps on this rank. What is copied onto itself is not written
/// ([`Region::copy_from`](crate::memory::Region::copy_from)).
fn accesses(world: &World, rank: usize, plan: &Plan) -> Vec<Access> {
    let mut list = Vec::new();
    let local = world.shape.local_of(rank) as u32;
    let here = |who: Who| who == Who::All || who == Who::One(local);
    for (step, s) in plan.steps.iter().enumerate() {
        let mut add = |span: Span, item: usize, write: bool| {
            list.push(Access { span: world.home(rank, span), step, item, write });
        };
        let is_itself = |src: Span, dst: Span| world.home(rank, src) == world.home(rank, dst);
        match &s.op {
            Op::Phase(moves) => {
                for (item, m) in moves.iter().enumerate() {
                    if here(m.from) {
                        add(m.src, item, false);
                    }
                    let stays = m.from == Who::One(local) && is_itself(m.src, m.dst);
                    if here(m.to) && !stays {
                        add(m.dst, item, true);
                    }
                }
            }
            Op::Send { src, .. } => add(*src, 0, false),
            Op::Recv { dst, .. } => add(*dst, 0, true),
            Op::Reduce { dst, srcs, .. } => {
                srcs.iter().for_each(|src| add(*src, 0, false));
                add(*dst, 0, true);
            }
            Op::Copy { dst, src } => {
                add(*src, 0, false);
                if !is_itself(*src, *dst) {
                    add(*dst, 0, true);
                }
            }
        }
    }
    list
}

fn check_bounds(world: &World, rank: usize, plan: &Plan, list: &[Access], shift: usize) -> Result<(), Fault> {
    let elem = world.calls[rank].elem;
    for a in list {
        let limit = match a.span.buf {
            Buf::Scratch => plan.scratch,
            buf => (world.elements(rank, buf) * elem).saturating_sub(shift),
        };
        if a.span.len > 0 && a.end() > limit {
            return Err(Fault::Bounds { rank, step: a.step, span: a.span, limit });
        }
        if !a.span.off.is_multiple_of(elem) || !a.span.len.is_multiple_of(elem) {
            let what = format!("{:?} is not made of whole elements", a.span);
            return Err(Fault::Malformed { rank, step: a.step, what });
        }
    }
    Ok(())
}

/// Which steps come before a step, directly or not.
struct Order {
    words: usize,
    before: Vec<u64>,
}

impl Order {
    fn new(plan: &Plan) -> Order {
        let words = plan.steps.len().div_ceil(64);
        let mut before = vec![0; words * plan.steps.len()];
        for (step, s) in plan.steps.iter().enumerate() {
            let (done, rest) = before.split_at_mut(step * words);
            for &on in &s.after {
                let on = on as usize;
                rest[on / 64] |= 1 << (on % 64);
                rest[..words].iter_mut().zip(&done[on * words..][..words]).for_each(|(a, b)| *a |= b);
            }
        }
        Order { words, before }
    }

    /// Whether one of the two comes before the other.
    fn holds(&self, a: usize, b: usize) -> bool {
        let before = |x: usize, y: usize| self.before[y * self.words + x / 64] >> (x % 64) & 1 == 1;
        before(a, b) || before(b, a)
    }
}

/// P2 within a round.
fn check_order(rank: usize, plan: &Plan, list: &[Access]) -> Result<(), Fault> {
    let order = Order::new(plan);
    for buf in [Buf::Input, Buf::Output, Buf::Scratch] {
        let mut sorted: Vec<Access> =
            list.iter().copied().filter(|a| a.span.buf == buf && a.span.len > 0).collect();
        sorted.sort_by_key(|a| a.span.off);
        let mut open: Vec<Access> = Vec::new();
        for a in sorted {
            open.retain(|o| o.end() > a.span.off);
            for o in &open {
                let fine = if o.step == a.step {
                    // A step's source may be its target, not half of it.
                    !(o.write || a.write) || (o.item == a.item && o.span == a.span && o.write != a.write)
                } else {
                    !(o.write || a.write) || order.holds(o.step, a.step)
                };
                if !fine {
                    let (first, second) = (o.step.min(a.step), o.step.max(a.step));
                    let to = o.end().min(a.end());
                    return Err(Fault::Race { rank, first, second, apart: 0, buf, from: a.span.off, to });
                }
            }
            open.push(a);
        }
    }
    Ok(())
}

/// P2 between rounds in flight: their scratch is apart, and nothing orders what they do to the user's buffers.
fn check_rounds(world: &World, rank: usize, touched: Vec<Vec<Access>>) -> Result<(), Fault> {
    let schedule = &world.schedules[rank];
    if schedule.full_rounds == 0 {
        return Ok(());
    }
    let sorted: Vec<Vec<Access>> = touched
        .into_iter()
        .map(|mut list| {
            list.retain(|a| a.span.buf != Buf::Scratch && a.span.len > 0);
            list.sort_by_key(|a| (a.span.buf, a.span.off));
            list
        })
        .collect();
    for apart in 1..schedule.window.min(schedule.rounds()) {
        let shift = apart * schedule.round_bytes;
        if apart < schedule.full_rounds {
            check_pair(rank, &sorted[0], &sorted[0], apart, shift)?;
        }
        if schedule.tail.is_some() && apart <= schedule.full_rounds {
            check_pair(rank, &sorted[0], &sorted[1], apart, shift)?;
        }
    }
    Ok(())
}

/// `early` against `late` moved up by `shift`; both sorted by place.
fn check_pair(
    rank: usize,
    early: &[Access],
    late: &[Access],
    apart: usize,
    shift: usize,
) -> Result<(), Fault> {
    let mut all: Vec<(Access, bool)> = early.iter().map(|a| (*a, false)).collect();
    all.extend(late.iter().map(|a| {
        let span = Span { off: a.span.off + shift, ..a.span };
        (Access { span, ..*a }, true)
    }));
    all.sort_by_key(|(a, _)| (a.span.buf, a.span.off));
    let mut open: Vec<(Access, bool)> = Vec::new();
    for (a, is_late) in all {
        open.retain(|(o, _)| o.span.buf == a.span.buf && o.end() > a.span.off);
        for (o, other) in &open {
            if *other != is_late && (o.write || a.write) {
                let (first, second) = if is_late { (o.step, a.step) } else { (a.step, o.step) };
                let to = o.end().min(a.end());
                return Err(Fault::Race {
                    rank,
                    first,
                    second,
                    apart,
                    buf: a.span.buf,
                    from: a.span.off,
                    to,
                });
            }
        }
        open.push((a, is_late));
    }
    Ok(())
}
