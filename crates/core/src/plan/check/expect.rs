//! What each collective must leave in the buffers.

use super::fault::Fault;
use super::run::Run;
use super::values::{Cell, ValueId};
use super::world::World;
use crate::call::Collective;
use crate::plan::data::Buf;

/// An element of the result.
enum Wanted {
    /// Element of the input, from every rank.
    Sum(usize),
    /// Element of one rank's input.
    From(usize, usize),
    /// As it was.
    Own,
    /// Nothing.
    Nothing,
}

pub(super) fn check(world: &World, run: &Run<'_>) -> Result<(), Fault> {
    for rank in 0..world.shape.size() {
        if world.calls[0].collective == Collective::Barrier {
            check_barrier(world, run, rank)?;
        }
        let (holder, place) = world.result(rank);
        for (element, &cell) in run.cells(rank, holder)[place.clone()].iter().enumerate() {
            let wanted = wanted(world, rank, element);
            check_cell(world, run, rank, element, cell, &wanted)?;
            let all_hold_it = world.calls[0].collective == Collective::AllReduce;
            if all_hold_it && run.cells(0, Buf::Output)[element].value != cell.value {
                return Err(Fault::Association { rank: 0, other: rank, element });
            }
        }
        let is_result = |element: usize| holder == Buf::Input && place.contains(&element);
        let is_lost =
            |&(element, cell): &(usize, &Cell)| *cell != Cell::of(element, rank) && !is_result(element);
        if let Some((element, _)) = run.cells(rank, Buf::Input).iter().enumerate().find(is_lost) {
            return Err(Fault::Clobbered { rank, buf: Buf::Input, element });
        }
    }
    Ok(())
}

fn wanted(world: &World, rank: usize, element: usize) -> Wanted {
    let call = &world.calls[rank];
    // Which rank's block an element lies in, and where in it, by the blocks' lengths.
    let place = |lengths: &dyn Fn(usize) -> usize| {
        let mut at = element;
        let mut block = 0;
        while at >= lengths(block) {
            at -= lengths(block);
            block += 1;
        }
        (block, at)
    };
    match call.collective {
        Collective::AllReduce => Wanted::Sum(element),
        Collective::Reduce if rank == call.root => Wanted::Sum(element),
        Collective::Reduce | Collective::Barrier | Collective::SendRecv => Wanted::Own,
        Collective::Broadcast => Wanted::From(call.root, element),
        Collective::AllGather => {
            let (block, at) = match &call.counts {
                Some(counts) => place(&|r| counts[r]),
                None => (element / call.count, element % call.count),
            };
            // The caller's affair (F3).
            if call.far && block == rank { Wanted::Nothing } else { Wanted::From(block, at) }
        }
        Collective::ReduceScatter => Wanted::Sum(world.before_own(rank) + element),
        Collective::AllToAll => match &call.splits {
            Some((_, recv)) => {
                let (from, at) = place(&|r| recv[r]);
                let before =
                    world.calls[from].splits.as_ref().map_or(0, |(send, _)| send[..rank].iter().sum());
                Wanted::From(from, before + at)
            }
            None => Wanted::From(element / call.count, rank * call.count + element % call.count),
        },
        Collective::Gather => Wanted::From(element / call.count, element % call.count),
        Collective::Scatter => Wanted::From(call.root, world.before_own(rank) + element),
    }
}

fn check_cell(
    world: &World,
    run: &Run<'_>,
    rank: usize,
    element: usize,
    cell: Cell,
    wanted: &Wanted,
) -> Result<(), Fault> {
    let size = world.shape.size();
    match (cell.value.is_defined(), wanted) {
        (false, Wanted::Nothing) => return Ok(()),
        (true, Wanted::Nothing) => return Err(Fault::Clobbered { rank, buf: Buf::Output, element }),
        (false, _) => return Err(Fault::Unwritten { rank, element }),
        (true, _) => {}
    }
    let (source, one) = match *wanted {
        Wanted::Sum(source) => (source, None),
        Wanted::From(one, source) => (source, Some(one)),
        Wanted::Own if cell == Cell::of(element, rank) => return Ok(()),
        Wanted::Own | Wanted::Nothing => return Err(Fault::Clobbered { rank, buf: Buf::Output, element }),
    };
    if cell.element as usize != source {
        return Err(Fault::WrongElement { rank, element, holds: cell.element as usize, wanted: source });
    }
    let right = match one {
        Some(one) => cell.value == ValueId::leaf(one) || (run.values.contributors(cell.value) == [one]),
        None => run.values.count(cell.value) == size,
    };
    if !right {
        let has = run.values.contributors(cell.value);
        let should: Vec<usize> = one.map_or_else(|| (0..size).collect(), |one| vec![one]);
        let missing = should.iter().copied().filter(|r| !has.contains(r)).collect();
        let excess = has.into_iter().filter(|r| !should.contains(r)).collect();
        return Err(Fault::WrongContributors { rank, element, missing, excess });
    }
    let finished = run.values.finished(cell.value);
    if size > 1 && finished != one.is_none() {
        return Err(Fault::Finish { rank, element, finished });
    }
    Ok(())
}

/// A barrier's result is somewhere in scratch: all ranks were heard of.
fn check_barrier(world: &World, run: &Run<'_>, rank: usize) -> Result<(), Fault> {
    let size = world.shape.size();
    let most = run.cells(rank, Buf::Scratch).iter().max_by_key(|c| run.values.count(c.value));
    let heard = most.map_or_else(|| vec![rank], |c| run.values.contributors(c.value));
    if heard.len() == size {
        return Ok(());
    }
    let missing = (0..size).filter(|r| !heard.contains(r)).collect();
    Err(Fault::WrongContributors { rank, element: 0, missing, excess: Vec::new() })
}
