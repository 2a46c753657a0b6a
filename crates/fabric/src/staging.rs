//! The memory this crate owns or was told of: message slots, bounce slots, registered staging.
//!
//! Sizes are fixed when the endpoint opens, whatever the number of peers (16 MiB in all by default): two sets of
//! slots of about 1 MiB, unexpected messages up to a quarter of SMDDP_STAGING, and, where the provider needs
//! registered memory for real, bounce slots of half of SMDDP_STAGING. Only where lost peers may still write to all the slots
//! for receiving there are new ones, and those stay until the endpoint closes.

use smddp_core::memory::{Owner, Region};

use crate::arena::Arena;
use crate::domain::{Domain, Mr};
use crate::error::Error;
use crate::wire::{HEADER, MAX_RAILS};

/// Receive slots on each rail but the first, over which little is said: to probes, and of groups' ends.
const SIDE_SLOTS: usize = 8;

/// Bytes of one bounce slot: large enough for full bandwidth, small enough to pipeline.
pub const BOUNCE: usize = 256 << 10;

/// An arena registered on the first `rails` rails.
#[derive(Debug)]
pub struct Slots {
    pub arena: Arena,
    pub mrs: Vec<Mr>,
}

impl Slots {
    pub fn new<D: Domain>(rails: &mut [D], count: usize, slot: usize, remote: bool) -> Result<Slots, Error> {
        let arena = Arena::new(count, slot)?;
        let mrs = rails
            .iter_mut()
            .map(|d| d.register(arena.whole(), Owner::Host, remote))
            .collect::<Result<_, _>>()?;
        Ok(Slots { arena, mrs })
    }
}

/// Memory of others, registered on every rail.
#[derive(Debug)]
struct Registered {
    memory: Region,
    owner: Owner,
    mrs: [Option<Mr>; MAX_RAILS],
}

#[derive(Debug)]
pub struct Staging {
    pub send: Slots,
    /// So many for the first rail, then [`SIDE_SLOTS`] for each other over which something is said.
    pub recv: Slots,
    first: usize,
    /// Bounce slots, for sending and receiving apart, so that neither can starve the other.
    pub bounce: Option<(Slots, Slots)>,
    /// Slots for receiving that are not used again, and the arenas of which there was no other left.
    quarantined: usize,
    retired: Vec<Slots>,
    /// What [`Fabric::register`](smddp_core::transport::Fabric::register) was given.
    registered: Vec<Registered>,
    /// Credits this process may have given out in all.
    pub budget: u32,
}

impl Staging {
    pub fn new<D: Domain>(rails: &mut [D], eager: usize, staging: usize) -> Result<Staging, Error> {
        let slot = HEADER + eager.max(1024);
        let count = ((1 << 20) / slot).clamp(32, 128);
        let used = if rails[0].caps().ordered { rails.len() } else { 1 };
        let send = Slots::new(&mut rails[..used], count, slot, false)?;
        let recv = Slots::new(&mut rails[..used], count + (used - 1) * SIDE_SLOTS, slot, false)?;
        let bounce = if rails[0].caps().needs_local_mr {
            let each = (staging / 4 / BOUNCE).max(2);
            Some((Slots::new(rails, each, BOUNCE, false)?, Slots::new(rails, each, BOUNCE, true)?))
        } else {
            None
        };
        let budget = (staging / 4 / slot).max(1) as u32;
        Ok(Staging {
            send,
            recv,
            first: count,
            bounce,
            quarantined: 0,
            retired: Vec::new(),
            registered: Vec::new(),
            budget,
        })
    }

    /// The rail that a receive slot is for.
    pub fn rail_of(&self, slot: u32) -> usize {
        (slot as usize).checked_sub(self.first).map_or(0, |at| 1 + at / SIDE_SLOTS)
    }

    /// A bounce slot to which a lost peer may still write is not given back. After the last one nothing refers to the
    /// arena any more but such peers, and another takes its place.
    pub fn quarantine<D: Domain>(&mut self, rails: &mut [D]) -> Result<(), Error> {
        let Some((_, slots)) = &mut self.bounce else { return Ok(()) };
        self.quarantined += 1;
        if self.quarantined == slots.arena.count() {
            let fresh = Slots::new(rails, slots.arena.count(), BOUNCE, true)?;
            self.retired.push(std::mem::replace(slots, fresh));
            self.quarantined = 0;
        }
        Ok(())
    }

    /// Registers memory on every rail, until it is taken back or the endpoint ends.
    pub fn register<D: Domain>(
        &mut self,
        rails: &mut [D],
        memory: Region,
        owner: Owner,
    ) -> Result<(), Error> {
        let mut mrs = [None; MAX_RAILS];
        let all = mrs.iter_mut().zip(&mut *rails).try_for_each(|(mr, domain)| {
            *mr = Some(domain.register(memory, owner, true)?);
            Ok(())
        });
        self.registered.push(Registered { memory, owner, mrs });
        if all.is_err() {
            self.deregister(rails, memory);
        }
        all
    }

    /// Takes back what [`register`](Self::register) did for this very region.
    pub fn deregister<D: Domain>(&mut self, rails: &mut [D], memory: Region) {
        let Some(at) = self.registered.iter().position(|r| r.memory == memory) else { return };
        let Registered { mrs, .. } = self.registered.swap_remove(at);
        for (mr, domain) in mrs.into_iter().zip(rails) {
            mr.into_iter().for_each(|mr| domain.deregister(mr));
        }
    }

    /// The registration `memory` lies in, on `rail`, and its offset there.
    pub fn find(&self, memory: Region, rail: usize) -> Option<(Mr, usize)> {
        self.whole(memory).and_then(|(whole, offset)| Some((whole.mrs[rail]?, offset)))
    }

    /// Whether `memory` is a device's.
    pub fn is_on_device(&self, memory: Region) -> bool {
        self.whole(memory).is_some_and(|(whole, _)| whole.owner != Owner::Host)
    }

    /// The registered memory that `memory` is part of, and where.
    fn whole(&self, memory: Region) -> Option<(&Registered, usize)> {
        let start = memory.as_ptr() as usize;
        self.registered.iter().find_map(|r| {
            let offset = start.checked_sub(r.memory.as_ptr() as usize)?;
            let inside = offset.checked_add(memory.len())? <= r.memory.len();
            inside.then_some((r, offset))
        })
    }
}
