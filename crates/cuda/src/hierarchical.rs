//! Collectives over nodes of equally many ranks: NCCL inside the nodes, pinned slots and the rail between them.
//!
//! A call is cut into chunks. Each has a part in the node, then one between nodes, on the *rail*: the ranks of all nodes
//! with one local rank; then another in the node. Every byte crosses between nodes on one rail only:
//!
//! | call | in the node | on the rail | in the node |
//! | --- | --- | --- | --- |
//! | all_reduce | reduce_scatter | all_reduce | all_gather |
//! | reduce_scatter | for each node, the reduce_scatter of its rows | reduce_scatter | |
//! | all_gather | | all_gather | for each node, the all_gather of its rows |
//! | broadcast | from the root, in its node | broadcast | all_gather, in other nodes |
//!
//! NCCL's parts run on the caller's stream and the rest beside it:
//!
//! ```text
//! stream   A0 A1 A2 ... A(d-1) B0 Ad B1 ...
//! rail        [  0  ][  1  ][  2  ]
//! ```
//!
//! With `d` slots, the first part of chunk `k + d` comes behind the last of chunk `k`, since it is its slot that it needs;
//! so a slot's event is waited for before it is recorded anew. Calls may come from several streams: a first part that writes
//! to a slot's device memory comes behind the call before that used the slot, whichever stream it was enqueued on. All ranks
//! cut alike and make NCCL's calls in the same order.

use std::collections::VecDeque;

use smddp_core::communicator::{Communicator, Handle};
use smddp_core::topology::GroupShape;
use smddp_core::transport::Transports;
use smddp_core::{Collective, Result};
use smddp_cuda_sys as sys;

use crate::call::{DeviceCall, Memory};
use crate::nccl::{self, NcclComm};
use crate::stager::Stager;

/// Whether a call can go this way.
pub(crate) fn carries(call: &DeviceCall) -> bool {
    let is_even = call.counts.is_none() && call.splits.is_none();
    match call.collective {
        Collective::AllReduce | Collective::ReduceScatter => is_even && nccl::has_reduction(call),
        Collective::AllGather | Collective::Broadcast => is_even,
        _ => false,
    }
}

/// A chunk's way.
struct Chunk {
    before: Vec<DeviceCall>,
    /// Whether `before` writes to the slot's device memory.
    is_in_slot: bool,
    /// On the rail.
    exchange: DeviceCall,
    /// Where each row goes that comes from the rail.
    outputs: Vec<u64>,
    after: Vec<DeviceCall>,
}

/// What a call goes through.
pub(crate) struct Hierarchy<'a, T: Transports> {
    pub(crate) nccl: &'a NcclComm,
    /// Its ranks are the nodes.
    pub(crate) rail: &'a Communicator<T>,
    pub(crate) stager: &'a mut Stager,
    pub(crate) shape: &'a GroupShape,
    pub(crate) rank: usize,
    pub(crate) stream: sys::Stream,
}

impl<T: Transports> Hierarchy<'_, T> {
    /// Enqueues a call; one whose result has its input's place has the input there. The handle is that of the last
    /// exchange; none: there was nothing to exchange.
    pub(crate) fn enqueue(&mut self, call: &DeviceCall) -> Result<Option<Handle<T>>> {
        let enqueued = match call.collective {
            Collective::ReduceScatter => self.reduce_scatter(call),
            Collective::AllGather => self.all_gather(call),
            Collective::Broadcast => self.broadcast(call),
            _ => self.all_reduce(call),
        };
        if enqueued.is_err() {
            self.stager.leave_to(self.stream);
        }
        enqueued
    }

    /// What does not divide by the node's ranks is reduced on all of them and exchanged on every rail, with equal results.
    fn all_reduce(&mut self, call: &DeviceCall) -> Result<Option<Handle<T>>> {
        let (me, local) = (self.me(), self.local());
        let width = self.stager.columns(call, 1, call.count / local)?;
        let last = self.pipeline(call.count / local, width, |first, count, _| {
            let whole = call.output.part(call, first * local, count * local);
            let mine = call.output.part(call, first * local + me * count, count);
            Chunk {
                before: vec![call.with(Collective::ReduceScatter, count, whole, mine)],
                is_in_slot: false,
                exchange: call.with(Collective::AllReduce, count, mine, mine),
                outputs: vec![mine.address],
                after: vec![call.with(Collective::AllGather, count, mine, whole)],
            }
        })?;
        let Some(rest) = self.rest(call) else { return Ok(last) };
        self.nccl.enqueue(&rest, self.stream)?;
        self.stager.enqueue(self.rail, &rest, self.stream)
    }

    /// Of the root's node each rank sends its share on its rail. What does not divide is sent on every rail.
    fn broadcast(&mut self, call: &DeviceCall) -> Result<Option<Handle<T>>> {
        let (me, local) = (self.me(), self.local());
        let (from_node, from) = (self.shape.node_of(call.root), self.shape.local_of(call.root));
        let is_from_here = from_node == self.shape.node_of(self.rank);
        let width = self.stager.columns(call, 1, call.count / local)?;
        let last = self.pipeline(call.count / local, width, |first, count, _| {
            let whole = call.output.part(call, first * local, count * local);
            let mine = call.output.part(call, first * local + me * count, count);
            let spread = call.with(Collective::Broadcast, count * local, whole, whole).from(from);
            let gather = call.with(Collective::AllGather, count, mine, whole);
            Chunk {
                before: if is_from_here { vec![spread] } else { Vec::new() },
                is_in_slot: false,
                exchange: call.with(Collective::Broadcast, count, mine, mine).from(from_node),
                outputs: vec![mine.address],
                after: if is_from_here { Vec::new() } else { vec![gather] },
            }
        })?;
        let Some(rest) = self.rest(call) else { return Ok(last) };
        if is_from_here {
            self.nccl.enqueue(&rest.clone().from(from), self.stream)?;
        }
        self.stager.enqueue(self.rail, &rest.from(from_node), self.stream)
    }

    /// The rows of all nodes that this rank has after the node's part go through device memory of the slot.
    fn reduce_scatter(&mut self, call: &DeviceCall) -> Result<Option<Handle<T>>> {
        let nodes = self.shape.node_count();
        let width = self.stager.columns(call, nodes, call.count)?;
        let (shape, is_in_order, size) = (self.shape, self.is_in_order(), call.dtype.size());
        let local = self.local();
        self.pipeline(call.count, width, |first, count, scratch| {
            let to =
                |node: usize| Memory { address: scratch + (node * count * size) as u64, bytes: count * size };
            let before = if is_in_order && count == call.count {
                let rows = |node| call.input.part(call, node * local * count, local * count);
                let scatter = |node| call.with(Collective::ReduceScatter, count, rows(node), to(node));
                (0..nodes).map(scatter).collect()
            } else {
                let one = |rank: usize| {
                    let columns = call.input.part(call, rank * call.count + first, count);
                    call.with(Collective::Reduce, count, columns, to(shape.node_of(rank)))
                        .from(shape.local_of(rank))
                };
                (0..shape.size()).map(one).collect()
            };
            let rows = Memory { address: scratch, bytes: nodes * count * size };
            let output = call.output.part(call, first, count);
            let exchange = call.with(Collective::ReduceScatter, count, rows, output);
            Chunk { before, is_in_slot: true, exchange, outputs: vec![output.address], after: Vec::new() }
        })
    }

    fn all_gather(&mut self, call: &DeviceCall) -> Result<Option<Handle<T>>> {
        let nodes = self.shape.node_count();
        let width = self.stager.columns(call, nodes, call.count)?;
        let (shape, is_in_order, me, local) = (self.shape, self.is_in_order(), self.me(), self.local());
        self.pipeline(call.count, width, |first, count, _| {
            let columns = |rank: usize| call.output.part(call, rank * call.count + first, count);
            let mine = |node: usize| columns(shape.ranks_on(node)[me] as usize);
            let after = if is_in_order && count == call.count {
                let rows = |node| call.output.part(call, node * local * count, local * count);
                let gather = |node| call.with(Collective::AllGather, count, mine(node), rows(node));
                (0..nodes).map(gather).collect()
            } else {
                let one = |rank: usize| {
                    call.with(Collective::Broadcast, count, columns(rank), columns(rank))
                        .from(shape.local_of(rank))
                };
                (0..shape.size()).map(one).collect()
            };
            let input = call.input.part(call, first, count);
            Chunk {
                before: Vec::new(),
                is_in_slot: false,
                exchange: call.with(Collective::AllGather, count, input, call.output),
                outputs: (0..nodes).map(|node| mine(node).address).collect(),
                after,
            }
        })
    }

    /// Enqueues `total` columns in chunks of `width`. `chunk_of` gets the first column, the number of columns, and the
    /// address of the device memory that belongs to the slot.
    fn pipeline(
        &mut self,
        total: usize,
        width: usize,
        chunk_of: impl Fn(usize, usize, u64) -> Chunk,
    ) -> Result<Option<Handle<T>>> {
        let mut under_way: VecDeque<(usize, Vec<DeviceCall>)> = VecDeque::with_capacity(self.stager.depth());
        let mut last = None;
        for first in (0..total).step_by(width) {
            if under_way.len() == self.stager.depth()
                && let Some((slot, after)) = under_way.pop_front()
            {
                self.finish(slot, &after)?;
            }
            let chunk = chunk_of(first, width.min(total - first), self.stager.scratch());
            if chunk.is_in_slot {
                self.stager.join_next(self.stream)?;
            }
            self.nccl.enqueue_all(&chunk.before, self.stream)?;
            let (slot, handle) = self.stager.fork(self.rail, &chunk.exchange, &chunk.outputs, self.stream)?;
            last = Some(handle);
            under_way.push_back((slot, chunk.after));
        }
        for (slot, after) in under_way {
            self.finish(slot, &after)?;
        }
        Ok(last)
    }

    fn finish(&self, slot: usize, after: &[DeviceCall]) -> Result<()> {
        self.stager.join(slot, self.stream)?;
        self.nccl.enqueue_all(after, self.stream)
    }

    /// The elements that do not divide by the node's ranks.
    fn rest(&self, call: &DeviceCall) -> Option<DeviceCall> {
        let count = call.count % self.local();
        let memory = call.output.part(call, call.count - count, count);
        (count > 0).then(|| call.with(call.collective, count, memory, memory))
    }

    fn me(&self) -> usize {
        self.shape.local_of(self.rank)
    }

    fn local(&self) -> usize {
        self.shape.local_size(self.rank)
    }

    /// Whether each node's ranks, and so its rows, follow one another.
    fn is_in_order(&self) -> bool {
        let local = self.local();
        (0..self.shape.size()).all(|r| self.shape.node_of(r) == r / local)
    }
}

impl Memory {
    fn part(self, call: &DeviceCall, first: usize, count: usize) -> Memory {
        let size = call.dtype.size();
        Memory { address: self.address + (first * size) as u64, bytes: count * size }
    }
}

impl DeviceCall {
    /// Another call, of the same type, operation and limit.
    fn with(&self, collective: Collective, count: usize, input: Memory, output: Memory) -> DeviceCall {
        DeviceCall { collective, count, input, output, counts: None, splits: None, ..self.clone() }
    }

    fn from(self, root: usize) -> DeviceCall {
        DeviceCall { root, ..self }
    }
}
