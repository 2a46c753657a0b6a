//! All-reduce over nodes of equally many ranks: NCCL inside the nodes, pinned slots and the rail between them.
//!
//! The memory is cut into chunks of one slot a rank. Each is reduce-scattered in the node, so that every rank has a shard
//! of it; the shard is all-reduced with those of the other nodes' ranks of this local number, its *rail*; and the shards
//! are gathered in the node. NCCL's part runs on the caller's stream and the rest beside it:
//!
//! ```text
//! stream   RS0 RS1 RS2 ... RS(d-1) AG0 RSd AG1 ...
//! rail         [  0  ][  1  ][  2  ]
//! ```
//!
//! With `d` slots, RS of chunk `k + d` comes behind AG of chunk `k`, since it is its slot that it needs; so a slot's event
//! is waited for before it is recorded anew. All ranks cut alike and make NCCL's calls in the same order.

use std::collections::VecDeque;

use smddp_core::communicator::{Communicator, Handle};
use smddp_core::transport::Transports;
use smddp_core::{Collective, Result};
use smddp_cuda_sys as sys;

use crate::group::{DeviceCall, Memory};
use crate::nccl::NcclComm;
use crate::stager::Stager;

/// A chunk whose shards are on the rail.
struct Chunk {
    slot: usize,
    gather: DeviceCall,
}

/// Enqueues `call`, whose output has the input, on `stream`; `me` of `local` ranks of this node. The handle is that of the
/// last exchange; none: there was nothing to exchange.
///
/// What does not divide by the node's ranks is reduced on all of them and exchanged on every rail, with equal results.
pub(crate) fn all_reduce<T: Transports>(
    nccl: &NcclComm,
    rail: &Communicator<T>,
    stager: &mut Stager,
    call: &DeviceCall,
    (me, local): (usize, usize),
    stream: sys::Stream,
) -> Result<Option<Handle<T>>> {
    let size = call.dtype.size();
    let piece = |first: usize, count: usize| Memory {
        address: call.output.address + (first * size) as u64,
        bytes: count * size,
    };
    let part = |collective, count, input, output| DeviceCall {
        collective,
        count,
        input,
        output,
        counts: None,
        splits: None,
        ..call.clone()
    };
    let (divided, chunk) = (call.count / local * local, stager.columns(size) * local);
    let mut under_way: VecDeque<Chunk> = VecDeque::with_capacity(stager.depth());
    let mut last = None;
    for first in (0..divided).step_by(chunk) {
        if under_way.len() == stager.depth()
            && let Some(oldest) = under_way.pop_front()
        {
            gather(nccl, stager, &oldest, stream)?;
        }
        let count = chunk.min(divided - first) / local;
        let (whole, mine) = (piece(first, count * local), piece(first + me * count, count));
        nccl.enqueue(&part(Collective::ReduceScatter, count, whole, mine), stream)?;
        let (slot, handle) = stager.fork(rail, &part(Collective::AllReduce, count, mine, mine), stream)?;
        last = Some(handle);
        under_way.push_back(Chunk { slot, gather: part(Collective::AllGather, count, mine, whole) });
    }
    for chunk in under_way {
        gather(nccl, stager, &chunk, stream)?;
    }
    if call.count > divided {
        let rest = piece(divided, call.count - divided);
        let reduce = part(Collective::AllReduce, call.count - divided, rest, rest);
        nccl.enqueue(&reduce, stream)?;
        last = stager.enqueue(rail, &reduce, stream)?;
    }
    Ok(last)
}

fn gather(nccl: &NcclComm, stager: &Stager, chunk: &Chunk, stream: sys::Stream) -> Result<()> {
    stager.join(chunk.slot, stream)?;
    nccl.enqueue(&chunk.gather, stream)
}
