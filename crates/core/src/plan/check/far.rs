//! P7: what [`crate::far`] promises of calls whose data lies on a device.

use super::fault::Fault;
use super::world::World;
use crate::call::Collective;
use crate::far::{least_message, own_share};
use crate::plan::data::{Buf, Op, Span};

pub(super) fn check(world: &World, rank: usize) -> Result<(), Fault> {
    let (call, schedule) = (&world.calls[rank], &world.schedules[rank]);
    let wrong = |step: usize, what: &str| Err(Fault::Far { rank, step, what: what.to_owned() });
    if schedule.rounds() > 1 {
        return wrong(0, "F4: more than one round");
    }
    let size = world.shape.size();
    let (start, len) = own_share(call.collective, call.elem, call.count, size, rank);
    let is_own = |span: &Span| match span.buf {
        Buf::Scratch => true,
        // Its output is the sum of the own share, of as many bytes.
        Buf::Output if call.collective == Collective::ReduceScatter => true,
        Buf::Input | Buf::Output => start <= span.off && span.off + span.len <= start + len,
    };
    let is_apart = |span: &Span| span.off + span.len <= start || start + len <= span.off;
    let least = least_message(call.collective, call.elem, call.count, size);
    for (step, s) in schedule.body.steps.iter().enumerate() {
        match &s.op {
            Op::Send { src: span, .. } | Op::Recv { dst: span, .. } => {
                if !is_own(span) && !is_apart(span) {
                    return wrong(step, "F1: a message partly in the own share");
                }
                if span.len < least {
                    return wrong(step, "F4: a message shorter than the least");
                }
            }
            Op::Reduce { dst, srcs, .. } => {
                if !srcs.iter().chain([dst]).all(is_own) {
                    return wrong(step, "F2: it computes beyond the own share");
                }
            }
            Op::Copy { .. } | Op::Phase(_) => return wrong(step, "F3: it copies"),
        }
    }
    Ok(())
}
