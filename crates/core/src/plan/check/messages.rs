//! P4, what can be seen without running: every send has its receive, of the same length.

use std::collections::HashMap;

use super::fault::{Fault, Place};
use super::world::World;
use crate::plan::data::Op;

/// One side of a message: (sender, receiver, tag) and (step, bytes).
type Sides = HashMap<(usize, usize, u32), (usize, usize)>;

pub(super) fn check(world: &World) -> Result<(), Fault> {
    let first = &world.schedules[0];
    for (rank, s) in world.schedules.iter().enumerate() {
        if (s.full_rounds, s.tail.is_some()) != (first.full_rounds, first.tail.is_some()) {
            return Err(Fault::RoundsDiffer { rank: 0, other: rank });
        }
    }
    let tail = first.tail.as_ref().map(|_| first.full_rounds);
    for round in (first.full_rounds > 0).then_some(0).into_iter().chain(tail) {
        let (sends, recvs) = sides(world, round);
        let sorted = |sides: &Sides| {
            let mut list: Vec<_> = sides.iter().map(|(k, v)| (*k, *v)).collect();
            list.sort_unstable();
            list
        };
        for ((from, to, tag), (step, sent)) in sorted(&sends) {
            let place = Place { rank: from, round, step };
            match recvs.get(&(from, to, tag)) {
                None => return Err(Fault::Unmatched { place, what: "a send", peer: to, tag }),
                Some(&(_, expected)) if expected != sent => {
                    return Err(Fault::Length { place, to, tag, sent, expected });
                }
                Some(_) => {}
            }
        }
        if let Some(((from, to, tag), (step, _))) =
            sorted(&recvs).into_iter().find(|(k, _)| !sends.contains_key(k))
        {
            let place = Place { rank: to, round, step };
            return Err(Fault::Unmatched { place, what: "a receive", peer: from, tag });
        }
    }
    Ok(())
}

/// All sends and all receives of a round.
fn sides(world: &World, round: usize) -> (Sides, Sides) {
    let (mut sends, mut recvs) = (Sides::new(), Sides::new());
    for (rank, schedule) in world.schedules.iter().enumerate() {
        for (step, s) in schedule.plan(round).steps.iter().enumerate() {
            match s.op {
                Op::Send { to, src, tag } => {
                    sends.insert((rank, to as usize, tag), (step, src.len));
                }
                Op::Recv { from, dst, tag } => {
                    recvs.insert((from as usize, rank, tag), (step, dst.len));
                }
                Op::Phase(_) | Op::Reduce { .. } | Op::Copy { .. } => {}
            }
        }
    }
    (sends, recvs)
}
