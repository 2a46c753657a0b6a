//! Memory that the ranks of each node of a group share, for data that calls are not to copy.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytemuck::Zeroable;
use smddp_core::shared::Shared;
use smddp_core::{Error, ReduceOp, Region, Result};
use smddp_shm::{Card, SharedBuffer};

use crate::transports::{Communicator, HostTransports};

type Entry = smddp_core::communicator::SharedEntry<HostTransports>;

/// Memory of this rank that the group's other ranks on its node map too, where they can: see [`SharedMemory::is_shared`].
///
/// A call reads, and where it is in place writes, every rank's data in it without copies: all_reduce, broadcast and
/// reduce their buffer, all_gather, reduce_scatter, all_to_all and gather their input. Every rank then passes data in the
/// memory made by the same call, at any offset, or none does. On several nodes what leaves a node leaves from there too, and
/// NICs know the memory. Calls below 16 KiB, those with blocks of different lengths, broadcast and all_gather over several
/// nodes, and all others take it as any memory.
///
/// No operation on it may be under way when it is dropped.
pub struct SharedMemory {
    // In this order: it leaves the group before it is unmapped.
    _entry: Option<Entry>,
    buffer: Arc<SharedBuffer>,
    why_not: Option<String>,
}

/// Memory that somebody else mapped over a file.
#[derive(Clone, Copy, Debug)]
pub struct Mapped<'a> {
    pub file: BorrowedFd<'a>,
    /// Where it is mapped from its first byte, for reading and writing.
    pub memory: Region,
}

impl SharedMemory {
    /// `bytes` of zeros on every rank, which calls this as it calls a collective; ranks may differ in `bytes`.
    ///
    /// # Errors
    /// [`Error::Resource`] on all ranks when one has not so much memory; errors of collectives.
    pub fn new(group: &Communicator, bytes: usize) -> Result<SharedMemory> {
        let made = SharedBuffer::new(bytes);
        let shared = SharedMemory::share(group, made.as_ref().ok().map(|b| b.card()).transpose()?);
        let buffer = made?;
        match shared? {
            Ok(peers) => SharedMemory::enter(group, buffer, peers),
            Err(Obstacle::Missing(ranks)) => Err(Error::Resource {
                what: "sharing memory between the ranks of a group".to_owned(),
                resource: "memory",
                reason: format!("rank(s) {ranks:?} could not make theirs"),
                hint: "Their errors say why".to_owned(),
            }),
            Err(other) => Ok(SharedMemory::alone(buffer, &other)),
        }
    }

    /// Shares memory that is there, on every rank, which calls this as it calls a collective. `None`: this rank has none
    /// to share, so that nothing is shared anywhere.
    ///
    /// # Safety
    /// The memory stays mapped as long as this lives.
    ///
    /// # Errors
    /// [`Error::Transport`] when this rank's file does not fit its mapping; errors of collectives.
    pub unsafe fn over(group: &Communicator, memory: Option<Mapped<'_>>) -> Result<Option<SharedMemory>> {
        // SAFETY: passed on to the caller.
        let made = memory.map(|m| unsafe { SharedBuffer::over(m.file, m.memory) }).transpose();
        let card = made.as_ref().ok().and_then(Option::as_ref).map(SharedBuffer::card).transpose()?;
        let shared = SharedMemory::share(group, card);
        let Some(buffer) = made? else { return shared.map(|_| None) };
        Ok(Some(match shared? {
            Ok(peers) => SharedMemory::enter(group, buffer, peers)?,
            Err(obstacle) => SharedMemory::alone(buffer, &obstacle),
        }))
    }

    /// Shows the card to the group's ranks and maps what those of this node show: the peers' memory by local rank, with
    /// none for this rank itself.
    fn share(
        group: &Communicator,
        card: Option<Card>,
    ) -> Result<std::result::Result<Vec<Option<SharedBuffer>>, Obstacle>> {
        let (shape, me) = (group.shape(), group.rank());
        if shape.size() == 1 {
            return Ok(Err(Obstacle::Alone));
        }
        let mut cards = vec![Card::zeroed(); shape.size()];
        let own = card.unwrap_or(Card::NONE);
        group.all_gather::<u8>(bytemuck::bytes_of(&own), bytemuck::cast_slice_mut(&mut cards))?;
        let missing: Vec<usize> = (0..cards.len()).filter(|&rank| cards[rank].is_none()).collect();
        if !missing.is_empty() {
            return Ok(Err(Obstacle::Missing(missing)));
        }
        let open = |&rank: &u32| {
            let rank = rank as usize;
            if rank == me { Ok(None) } else { SharedBuffer::of_peer(&cards[rank]).map(Some) }
        };
        let here = shape.ranks_on(shape.node_of(me));
        let opened: std::result::Result<Vec<_>, _> = here.iter().map(open).collect();
        // Also the sign that every peer has opened this rank's.
        let mut failures = [i32::from(opened.is_err())];
        group.all_reduce(&mut failures, ReduceOp::Sum)?;
        Ok(match (opened, failures[0]) {
            (Ok(peers), 0) => Ok(peers),
            (Err(error), _) => Err(Obstacle::Here(error.to_string())),
            (Ok(_), _) => Err(Obstacle::Elsewhere),
        })
    }

    fn enter(
        group: &Communicator,
        mut buffer: SharedBuffer,
        peers: Vec<Option<SharedBuffer>>,
    ) -> Result<SharedMemory> {
        buffer.close_file();
        let buffer = Arc::new(buffer);
        let region =
            |peer: &Option<SharedBuffer>| peer.as_ref().map_or(buffer.region(), SharedBuffer::region);
        let shared = Shared {
            number: group.next_shared(),
            parts: peers.iter().map(region).collect(),
            own: group.shape().local_of(group.rank()),
            keep: Arc::new((peers, Arc::clone(&buffer))),
        };
        Ok(SharedMemory { _entry: Some(group.enter_shared(shared)?), buffer, why_not: None })
    }

    fn alone(buffer: SharedBuffer, why: &Obstacle) -> SharedMemory {
        SharedMemory { _entry: None, buffer: Arc::new(buffer), why_not: Some(why.to_string()) }
    }

    /// All of it. Whoever uses the region keeps this.
    pub fn region(&self) -> Region {
        self.buffer.region()
    }

    /// Whether the group's ranks share it; the same on all of them.
    pub fn is_shared(&self) -> bool {
        self.why_not.is_none()
    }

    /// Why it is not shared, for people.
    pub fn why_not(&self) -> Option<&str> {
        self.why_not.as_deref()
    }
}

/// What keeps the ranks of a group from sharing memory.
#[derive(Debug)]
enum Obstacle {
    Alone,
    /// Ranks that have none to share.
    Missing(Vec<usize>),
    Here(String),
    Elsewhere,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Obstacle::Alone => write!(f, "memory is shared by several ranks; this group has one"),
            Obstacle::Missing(ranks) => write!(f, "rank(s) {ranks:?} had none to share"),
            Obstacle::Here(reason) => write!(f, "this rank cannot map a peer's memory: {reason}"),
            Obstacle::Elsewhere => write!(f, "another rank cannot map its peers' memory"),
        }
    }
}
