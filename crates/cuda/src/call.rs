//! Calls on device memory and messages between devices, as a program makes them, and what is refused of them wherever they go.

use std::time::Duration;

use smddp_core::error::Site;
use smddp_core::request::{Blocks, Request};
use smddp_core::{Collective, DType, Error, ReduceOp, Region, Result};

/// A range of device memory, of one allocation, or of one reserved range: the driver refuses copies over two, even where they are
/// neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub address: u64,
    pub bytes: usize,
}

impl Memory {
    /// Its address and length, to compare with others; nothing is read or written there.
    pub(crate) fn place(self) -> Region {
        let start = std::ptr::with_exposed_provenance_mut(self.address as usize);
        // SAFETY: no operation is given it.
        unsafe { Region::new(start, self.bytes) }
    }

    pub(crate) fn check(self, op: &str, argument: &'static str) -> Result<()> {
        if self.address != 0 || self.bytes == 0 {
            return Ok(());
        }
        Err(Error::Argument {
            op: op.to_owned(),
            argument,
            expected: "memory of the group's device".to_owned(),
            given: format!("{} bytes at address 0", self.bytes),
            hint: "Its memory was given back (FSDP does so with what it can gather again)".to_owned(),
        })
    }
}

/// A collective call on device memory; fields as in [`smddp_core::request::Request`].
#[derive(Clone, Debug)]
pub struct DeviceCall {
    pub collective: Collective,
    pub dtype: DType,
    pub op: ReduceOp,
    pub root: usize,
    pub count: usize,
    pub input: Memory,
    pub output: Memory,
    pub counts: Option<Blocks>,
    pub splits: Option<(Blocks, Blocks)>,
    pub timeout: Option<Duration>,
}

impl DeviceCall {
    /// The same call on `count` elements of host memory.
    pub(crate) fn request(&self, count: usize, input: Region, output: Region) -> Request {
        Request {
            op: self.op,
            root: self.root,
            counts: self.counts.clone(),
            splits: self.splits.clone(),
            timeout: self.timeout,
            ..Request::new(self.collective, self.dtype, count, input, output)
        }
    }
}

/// A message to or from another rank, or to oneself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMessage {
    /// The rank at the other end.
    pub peer: usize,
    pub memory: Memory,
    /// By this rank; else it is received.
    pub is_sent: bool,
}

/// NCCL moves messages to oneself if both ends are enqueued together, and fails the others with them if not.
pub(crate) fn check_to_oneself(messages: &[DeviceMessage], rank: usize) -> Result<()> {
    let own = || messages.iter().filter(|m| m.peer == rank && m.memory.bytes > 0);
    let lengths = |is_sent| own().filter(move |m| m.is_sent == is_sent).map(|m| m.memory.bytes);
    if lengths(true).eq(lengths(false)) {
        return Ok(());
    }
    let told = |is_sent| format!("{:?}", lengths(is_sent).collect::<Vec<_>>());
    Err(Error::Argument {
        op: "send and recv".to_owned(),
        argument: "peer",
        expected: "as many bytes received from this rank as are sent to it, in the same order".to_owned(),
        given: format!("messages of {} bytes to it and {} from it", told(true), told(false)),
        hint: "Pass both ends of a message to oneself to one batch_isend_irecv, or copy instead".to_owned(),
    })
}

/// For what was taken down; whose it was is known further out.
pub(crate) fn missing() -> Error {
    let reason = "the group's CUDA side was shut down. Make a new group".to_owned();
    Error::Aborted { site: Site::unknown(), reason }
}
