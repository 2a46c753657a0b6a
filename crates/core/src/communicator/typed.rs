//! Blocking calls on slices of elements, for Rust programs.

use crate::call::Collective;
use crate::dtype::{DType, ReduceOp};
use crate::element::Element;
use crate::engine::numbers::Stream;
use crate::error::{Error, Result};
use crate::memory::Region;
use crate::request::Request;
use crate::transport::Transports;

use super::Communicator;

/// Blocking calls on slices. Shapes are in elements; every rank of the group makes the same call.
///
/// # Errors
/// [`Error::Argument`] and [`Error::Unsupported`] for what cannot be done, before anything moves: the group stays usable. All others
/// end the group: [`Error::Mismatch`] where ranks made different calls, [`Error::Timeout`] at the group's time limit,
/// [`Error::PeerLost`] where a rank is gone, [`Error::Transport`] and [`Error::Resource`] where the network or memory fails, and
/// [`Error::Aborted`] on the other ranks, and in every later call.
impl<T: Transports> Communicator<T> {
    fn run_typed(&self, request: &Request) -> Result<()> {
        // SAFETY: the regions come from borrows that outlive this blocking call, and when it fails the engine has
        // withdrawn the operation (G3, E7), so nothing touches them later.
        let result = unsafe { self.run(request) };
        settle(request.dtype, request.output);
        result
    }

    /// Combines `buffer` of all ranks, in place; all end with the same bits.
    pub fn all_reduce<E: Element>(&self, buffer: &mut [E], op: ReduceOp) -> Result<()> {
        let region = whole(buffer);
        let request = Request::new(Collective::AllReduce, E::DTYPE, buffer.len(), region, region);
        self.run_typed(&Request { op, ..request })
    }

    /// `output` = this rank's block of the combination; `input` holds one block of `output.len()` for each rank.
    pub fn reduce_scatter<E: Element>(&self, input: &[E], output: &mut [E], op: ReduceOp) -> Result<()> {
        let (from, to) = (source(input), whole(output));
        let request = Request::new(Collective::ReduceScatter, E::DTYPE, output.len(), from, to);
        self.run_typed(&Request { op, ..request })
    }

    /// `output` = every rank's `input`, in rank order.
    pub fn all_gather<E: Element>(&self, input: &[E], output: &mut [E]) -> Result<()> {
        let (from, to) = (source(input), whole(output));
        self.run_typed(&Request::new(Collective::AllGather, E::DTYPE, input.len(), from, to))
    }

    /// Block `j` of `input` goes to rank `j`; block `i` of `output` comes from rank `i`.
    pub fn all_to_all<E: Element>(&self, input: &[E], output: &mut [E]) -> Result<()> {
        let (from, to) = (source(input), whole(output));
        self.run_typed(&Request::new(Collective::AllToAll, E::DTYPE, input.len() / self.size(), from, to))
    }

    /// As [`all_to_all`](Self::all_to_all) with blocks of different lengths, in elements, by rank.
    pub fn all_to_all_uneven<E: Element>(
        &self,
        input: &[E],
        send_counts: &[usize],
        output: &mut [E],
        recv_counts: &[usize],
    ) -> Result<()> {
        let (from, to) = (source(input), whole(output));
        let request = Request::new(Collective::AllToAll, E::DTYPE, 0, from, to);
        self.run_typed(&Request { splits: Some((send_counts.into(), recv_counts.into())), ..request })
    }

    /// Every rank's `buffer` becomes that of `root`.
    pub fn broadcast<E: Element>(&self, buffer: &mut [E], root: usize) -> Result<()> {
        let region = whole(buffer);
        let request = Request::new(Collective::Broadcast, E::DTYPE, buffer.len(), region, region);
        self.run_typed(&Request { root, ..request })
    }

    /// `buffer` of `root` becomes the combination; the others' stay as they are.
    pub fn reduce<E: Element>(&self, buffer: &mut [E], root: usize, op: ReduceOp) -> Result<()> {
        let region = whole(buffer);
        let request = Request::new(Collective::Reduce, E::DTYPE, buffer.len(), region, region);
        self.run_typed(&Request { root, op, ..request })
    }

    /// `output` of `root` = every rank's `input`, in rank order; the others pass `None`.
    pub fn gather<E: Element>(&self, input: &[E], output: Option<&mut [E]>, root: usize) -> Result<()> {
        let to = output.map_or(Region::EMPTY, whole);
        let request = Request::new(Collective::Gather, E::DTYPE, input.len(), source(input), to);
        self.run_typed(&Request { root, ..request })
    }

    /// `output` = this rank's block of `root`'s `input`; the others pass `None`.
    pub fn scatter<E: Element>(&self, input: Option<&[E]>, output: &mut [E], root: usize) -> Result<()> {
        let from = input.map_or(Region::EMPTY, source);
        let request = Request::new(Collective::Scatter, E::DTYPE, output.len(), from, whole(output));
        self.run_typed(&Request { root, ..request })
    }

    /// Returns when every rank has called it.
    pub fn barrier(&self) -> Result<()> {
        self.run_typed(&Request::new(Collective::Barrier, DType::U8, 0, Region::EMPTY, Region::EMPTY))
    }

    /// Sends `data` to rank `to`; returns when `data` may be used again.
    pub fn send<E: Element>(&self, data: &[E], to: usize, tag: u64) -> Result<()> {
        // Waited for below while `data` is borrowed; a failure withdraws it (G3).
        self.message(&Stream { peer: to, tag, send: true }, E::DTYPE, source(data), true)?.wait(None)
    }

    /// Receives from rank `from`; `data` must have the length that was sent.
    pub fn recv<E: Element>(&self, data: &mut [E], from: usize, tag: u64) -> Result<()> {
        // As in `send`.
        let handle = self.message(&Stream { peer: from, tag, send: false }, E::DTYPE, whole(data), true)?;
        let result = handle.wait(None);
        settle(E::DTYPE, whole(data));
        result
    }

    /// Sends `data` to rank `to` and receives `into` from rank `from`, both at once, as `MPI_Sendrecv`.
    pub fn sendrecv<E: Element>(
        &self,
        data: &[E],
        to: usize,
        into: &mut [E],
        from: usize,
        tag: u64,
    ) -> Result<()> {
        let incoming = Stream { peer: from, tag, send: false };
        self.check_message(&incoming, E::DTYPE, size_of_val(into))?;
        // As in `send`; the one is waited for whatever becomes of the other.
        let sent = self.message(&Stream { peer: to, tag, send: true }, E::DTYPE, source(data), false)?;
        let received = self.message(&incoming, E::DTYPE, whole(into), true);
        let received = received.and_then(|handle| handle.wait(None));
        let sent = sent.wait(None);
        settle(E::DTYPE, whole(into));
        received.and(sent)
    }

    /// Receives the message of `tag` that comes first, and returns the rank it came from.
    pub fn recv_any<E: Element>(&self, data: &mut [E], tag: u64) -> Result<usize> {
        // SAFETY: as in `send`.
        let handle = unsafe { self.start_recv_any(tag, E::DTYPE, whole(data))? };
        let result = handle.wait(None);
        settle(E::DTYPE, whole(data));
        result?;
        handle.source().ok_or_else(|| Error::Internal("a message came from nowhere".to_owned()))
    }
}

/// Makes what came valid for its type: a truth value of another program is any byte that is not zero, one of Rust's is 1.
fn settle(dtype: DType, output: Region) {
    if dtype != DType::Bool {
        return;
    }
    for at in 0..output.len() {
        // SAFETY: within memory that the caller has back, and has borrowed mutably.
        unsafe {
            let byte = output.as_ptr().add(at);
            *byte = u8::from(*byte != 0);
        }
    }
}

/// The region of a buffer that a blocking call borrows until it returns.
fn whole<E: Element>(buffer: &mut [E]) -> Region {
    // SAFETY: every caller is a method above that borrows the buffer until its operation is over (R1 of `memory`).
    unsafe { Region::of(buffer) }
}

/// As [`whole`], for a buffer that is only read.
fn source<E: Element>(buffer: &[E]) -> Region {
    // SAFETY: as in `whole`; plans never write to an input that differs from the output (proven by the checker).
    unsafe { Region::new(buffer.as_ptr().cast_mut().cast(), size_of_val(buffer)) }
}
