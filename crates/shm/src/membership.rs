//! What a rank knows of its group on this node before they share memory.

use std::time::Instant;

use smddp_core::order::Order;

use crate::error::ShmError;
use crate::geometry::{Agreed, SingleCopies};
use crate::mask::MAX_LOCAL;

/// Who this rank is, and what it may expect of the others.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Random identity of the group, equal on all ranks.
    pub group: u64,
    /// What only this job's ranks know.
    pub secret: [u8; 32],
    /// This rank within the group's ranks on this node.
    pub local_rank: usize,
    /// Group rank of each local rank, for errors; its length is the local size.
    pub ranks: Vec<u32>,
    /// The node's name, for errors.
    pub node: String,
    /// For which calls' large blocks this rank reads and writes its peers' private memory. Local rank 0's word decides whether
    /// the group tries; then all ranks do in a call, or none.
    pub single_copy: SingleCopies,
    /// Whether who alone reads a piece hands its cache lines back. Local rank 0's word decides for the group.
    pub hands_back: bool,
    /// The order in which this rank reads much that comes from far: what a peer has written, and shared memory.
    pub far: Order,
    /// Results of so many bytes, all ranks of the node together, are stored past the caches; `None`: never. Each rank does
    /// as it thinks best.
    pub streams_from: Option<usize>,
    /// When to give up.
    pub deadline: Instant,
}

impl Membership {
    pub(crate) fn check(&self) -> Result<(), ShmError> {
        let size = self.ranks.len();
        if (1..=MAX_LOCAL).contains(&size) && self.local_rank < size {
            return Ok(());
        }
        Err(ShmError::Parameters(format!(
            "local rank {} of {size} ranks on node {} (at most {MAX_LOCAL} can share memory)",
            self.local_rank, self.node
        )))
    }

    /// What the group does where this is local rank 0.
    pub(crate) fn agreed(&self) -> Agreed {
        Agreed { single_copy: self.single_copy, hands_back: self.hands_back }
    }

    pub(crate) fn missing(&self, started: Instant, locals: impl Iterator<Item = usize>) -> ShmError {
        let missing = locals.map(|l| self.ranks[l] as usize).collect();
        ShmError::Late { waited: started.elapsed(), missing }
    }

    pub(crate) fn gone(&self, local: usize, reason: impl std::fmt::Display) -> ShmError {
        let peer = self.ranks[local] as usize;
        ShmError::Gone { peer, node: self.node.clone(), reason: reason.to_string() }
    }
}
