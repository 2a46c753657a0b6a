//! Messages between the ranks of a node, matched by [`MsgKey`] in whatever order sends and receives are posted.
//!
//! - **S1** A sender puts whole messages into a pair's cells one after another, so a cell needs no offset, and only
//!   the first frame of a message can meet a receive.
//! - **S2** Cells from a peer are taken out only while a receive from that peer is posted. Taking out what is not yet wanted
//!   (into a buffer of the message's size) lets receives be posted in any order. A lane somebody asked about in vain is
//!   emptied as if one were posted, until the next poll is over.
//! - **S3** Large messages are offered (`straight`), and an offer waits for its receive. While a rank waits for another message of that
//!   peer and nothing comes for a while, or before it sleeps, it refuses the offer: the message comes through cells, and S2 holds for it.

use std::collections::VecDeque;

use smddp_core::call::PackedCall;
use smddp_core::error::Site;
use smddp_core::transport::{Ctx, Message, MsgKey};
use smddp_core::{Error, Region, Result};

use crate::buffer::Buffer;
use crate::deal::{DEALS, End};
use crate::layout::{Frame, Memory};
use crate::mask::Mask;
use crate::pair::Place;
use crate::pen::Pen;
use crate::reach::AT_ONCE;
use crate::segment::Segment;
use crate::straight::{Copier, Outcome, Straight};
use crate::theirs::Theirs;

/// Polls in vain after which an offer is refused (S3).
const IN_VAIN: u32 = 40;

/// Bytes of an offer: an address.
const OFFER: usize = size_of::<u64>();

struct Outgoing {
    message: Message,
    sent: usize,
    /// It has been offered in vain.
    refused: bool,
}

/// A message that came before its receive.
struct Early {
    key: MsgKey,
    call: PackedCall,
    total: usize,
    held: Held,
}

enum Held {
    /// What came of it. The last of a lane may still be arriving.
    Bytes(Buffer),
    Offer {
        deal: usize,
        from: u64,
    },
}

/// Where the message that is arriving goes.
enum Target {
    Posted(Message),
    /// The lane's last early message.
    Early,
}

struct Incoming {
    target: Target,
    key: MsgKey,
    total: usize,
    got: usize,
}

/// Everything to and from one peer.
#[derive(Default)]
struct Lane {
    put: Place,
    outgoing: VecDeque<Outgoing>,
    /// Offered, not taken yet.
    given: Vec<Straight>,
    /// The peer cannot take what is offered.
    unable: bool,
    take: Place,
    posted: Vec<Message>,
    incoming: Option<Incoming>,
    early: Vec<Early>,
    /// Being taken.
    taken: Vec<Straight>,
    /// Asked about since the last poll.
    curious: bool,
    /// Polls since anything came.
    in_vain: u32,
}

pub(crate) struct Messages {
    me: usize,
    pen: Pen,
    /// A cell's reader hands its lines back.
    hands_back: bool,
    cells: usize,
    /// Bytes one poll may copy, each way.
    budget: usize,
    lanes: Vec<Lane>,
    /// Peers with something to send to, and to receive from, through cells; and those with straight messages under way.
    sending: Mask,
    receiving: Mask,
    giving: Mask,
    taking: Mask,
    copier: Copier,
    /// Whose messages come first in the next poll: another's each time.
    first: usize,
    /// Receives that were complete when they were posted.
    complete: Vec<Ctx>,
}

impl Messages {
    pub(crate) fn new(me: usize, segment: &Segment, pen: Pen, hands_back: bool, copier: Copier) -> Messages {
        let layout = segment.layout();
        Messages {
            me,
            pen,
            hands_back,
            cells: layout.cells,
            budget: layout.geometry.slot.max(64 << 10),
            lanes: (0..layout.local_size).map(|_| Lane::default()).collect(),
            sending: Mask::default(),
            receiving: Mask::default(),
            giving: Mask::default(),
            taking: Mask::default(),
            copier,
            first: 0,
            complete: Vec::new(),
        }
    }

    /// Bytes copied straight between this rank's private memory and its peers' so far.
    pub(crate) fn copied_once(&self) -> u64 {
        self.copier.bytes()
    }

    pub(crate) fn is_idle(&self) -> bool {
        let masks = [self.sending, self.receiving, self.giving, self.taking];
        masks.iter().all(Mask::is_empty) && self.complete.is_empty()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        for lane in &mut self.lanes {
            *lane = Lane { put: lane.put, take: lane.take, ..Lane::default() };
        }
        for mask in [&mut self.sending, &mut self.receiving, &mut self.giving, &mut self.taking] {
            *mask = Mask::default();
        }
        self.complete.clear();
    }

    fn check(&self, message: &Message) -> Result<usize> {
        let peer = message.peer as usize;
        if peer < self.lanes.len() {
            return Ok(peer);
        }
        Err(Error::Internal(format!("message with local rank {peer} of a node of {}", self.lanes.len())))
    }

    pub(crate) fn send(&mut self, message: Message) -> Result<()> {
        let peer = self.check(&message)?;
        self.lanes[peer].outgoing.push_back(Outgoing { message, sent: 0, refused: false });
        self.sending.set(peer);
        Ok(())
    }

    pub(crate) fn recv(&mut self, message: Message, segment: &Segment) -> Result<()> {
        let peer = self.check(&message)?;
        let lane = &mut self.lanes[peer];
        let Some(at) = lane.early.iter().position(|early| early.key == message.key) else {
            lane.posted.push(message);
            self.receiving.set(peer);
            return Ok(());
        };
        // Ordered, so that one that is still arriving stays last.
        let early = lane.early.remove(at);
        compare(&message, early.call, early.total)?;
        let mut buffer = match early.held {
            Held::Bytes(buffer) => buffer,
            Held::Offer { deal, from } => {
                let straight = Straight { message, deal, from };
                self.copier.accept(segment, peer, &straight);
                lane.taken.push(straight);
                self.taking.set(peer);
                return Ok(());
            }
        };
        message.region.slice(0, buffer.len()).copy_from(buffer.region());
        match &mut lane.incoming {
            Some(incoming) if incoming.key == message.key && incoming.total == early.total => {
                incoming.target = Target::Posted(message);
                self.receiving.set(peer);
            }
            _ => self.complete.push(message.ctx),
        }
        Ok(())
    }

    /// Sends a message on the spot if the next cell takes all of it. False: nothing was done.
    pub(crate) fn send_now(&mut self, message: &Message, segment: &Segment) -> bool {
        let peer = message.peer as usize;
        let len = message.region.len();
        let Some(lane) = self.lanes.get_mut(peer) else { return false };
        if !lane.outgoing.is_empty() || (!lane.unable && self.copier.offers(len)) {
            return false;
        }
        let index = lane.put.index(self.cells);
        let cell = segment.cell(self.me, peer, index);
        let data = segment.cell_data(self.me, peer, index);
        if len > data.len() || !lane.put.is_free(cell, self.cells) {
            return false;
        }
        self.pen.write(data.slice(0, len), message.region, !self.hands_back);
        lane.put.publish(cell, self.cells, frame(message, len, 0));
        call_back_lines(segment, (self.me, peer), lane.put, self.cells, len);
        true
    }

    /// Receives a message on the spot if it is what the next cell holds, all of it. `None`: nothing has come yet.
    pub(crate) fn recv_now(&mut self, message: &Message, segment: &Segment) -> Option<bool> {
        let peer = message.peer as usize;
        let Some(lane) = self.lanes.get_mut(peer) else { return Some(false) };
        let index = lane.take.index(self.cells);
        let cell = segment.cell(peer, self.me, index);
        let is_early = lane.incoming.is_some() || lane.early.iter().any(|early| early.key == message.key);
        if is_early {
            return Some(false);
        }
        let found = lane.take.arrived(cell, self.cells)?;
        let data = segment.cell_data(peer, self.me, index);
        let len = message.region.len();
        // What is anything else, or makes no sense, is for the poll to judge.
        if len > data.len() || found != frame(message, len, 0) {
            return Some(false);
        }
        Theirs::within(segment, self.hands_back).copy(message.region, data.slice(0, len));
        lane.take.release(cell, self.cells);
        lane.in_vain = 0;
        Some(true)
    }

    /// Whether an unexpected message with `key` has begun to come (S2).
    pub(crate) fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool {
        let Some(lane) = self.lanes.get_mut(peer as usize) else { return false };
        if lane.early.iter().any(|early| early.key == *key) {
            return true;
        }
        lane.curious = true;
        self.receiving.set(peer as usize);
        false
    }

    /// The call that the next frame from `peer` belongs to, if that is the group's collective number `seq`.
    pub(crate) fn next_of_call(&self, peer: usize, seq: u64, segment: &Segment) -> Option<PackedCall> {
        let place = self.lanes[peer].take;
        let frame = place.arrived(segment.cell(peer, self.me, place.index(self.cells)), self.cells)?;
        (frame.key.seq == seq).then_some(frame.call)
    }

    /// Whether `peer` has sent anything that was not taken out yet.
    pub(crate) fn lie_ready(&self, peer: usize, segment: &Segment) -> bool {
        let place = self.lanes[peer].take;
        place.arrived(segment.cell(peer, self.me, place.index(self.cells)), self.cells).is_some()
    }

    /// Moves what can be moved; true when anything did. `is_last`: before a sleep.
    pub(crate) fn poll(&mut self, segment: &Segment, is_last: bool, done: &mut Vec<Ctx>) -> Result<bool> {
        let mut moved = !self.complete.is_empty();
        done.append(&mut self.complete);
        let mut budget = self.budget;
        for peer in self.sending.iter_from(self.first) {
            moved |= self.put(peer, segment, done, &mut budget);
        }
        moved |= self.take_straight(segment, done);
        let mut budget = self.budget;
        for peer in self.receiving.iter_from(self.first) {
            moved |= self.take(peer, segment, is_last, done, &mut budget)?;
            self.lanes[peer].curious = false;
        }
        moved |= self.give_straight(segment, done);
        self.first = (self.first + 1) % self.lanes.len();
        Ok(moved)
    }

    /// Fills cells to `peer`.
    fn put(&mut self, peer: usize, segment: &Segment, done: &mut Vec<Ctx>, budget: &mut usize) -> bool {
        let lane = &mut self.lanes[peer];
        let mut moved = false;
        while let Some(Outgoing { message, sent, refused }) = lane.outgoing.front_mut() {
            let index = lane.put.index(self.cells);
            let cell = segment.cell(self.me, peer, index);
            if *budget == 0 || !lane.put.is_free(cell, self.cells) {
                return moved;
            }
            let data = segment.cell_data(self.me, peer, index);
            if !*refused
                && !lane.unable
                && *sent == 0
                && self.copier.offers(message.region.len())
                && let Some(straight) = self.copier.offer(segment, peer, *message)
            {
                lane.put.publish(cell, self.cells, straight.frame(data));
                lane.given.push(straight);
                self.giving.set(peer);
                lane.outgoing.pop_front();
                moved = true;
                continue;
            }
            let len = (message.region.len() - *sent).min(data.len());
            self.pen.write(data.slice(0, len), message.region.slice(*sent, len), !self.hands_back);
            lane.put.publish(cell, self.cells, frame(message, len, 0));
            *sent += len;
            *budget = budget.saturating_sub(len.max(1));
            moved = true;
            if *sent == message.region.len() {
                done.push(message.ctx);
                lane.outgoing.pop_front();
                if lane.outgoing.is_empty() {
                    call_back_lines(segment, (self.me, peer), lane.put, self.cells, len);
                }
            }
        }
        self.sending.clear(peer);
        moved
    }

    /// Goes on with what peers have offered.
    fn take_straight(&mut self, segment: &Segment, done: &mut Vec<Ctx>) -> bool {
        let mut budget = AT_ONCE;
        let mut moved = false;
        for peer in self.taking.iter_from(self.first) {
            let lane = &mut self.lanes[peer];
            moved |= lane.take_straight(peer, segment, &mut self.copier, &mut budget, done);
            if lane.taken.is_empty() {
                self.taking.clear(peer);
            }
            if !lane.posted.is_empty() {
                self.receiving.set(peer);
            }
        }
        moved
    }

    /// Goes on with what this rank has offered.
    fn give_straight(&mut self, segment: &Segment, done: &mut Vec<Ctx>) -> bool {
        // What a rank reads itself is in its caches then: it writes for others when it has nothing to read.
        let mut budget = if self.taking.is_empty() { AT_ONCE } else { 0 };
        let mut moved = false;
        for peer in self.giving.iter_from(self.first) {
            let lane = &mut self.lanes[peer];
            moved |= lane.give_straight(peer, segment, &mut self.copier, &mut budget, done);
            if lane.given.is_empty() {
                self.giving.clear(peer);
            }
            if !lane.outgoing.is_empty() {
                self.sending.set(peer);
            }
        }
        moved
    }

    /// Empties cells from `peer`.
    fn take(
        &mut self,
        peer: usize,
        segment: &Segment,
        is_last: bool,
        done: &mut Vec<Ctx>,
        budget: &mut usize,
    ) -> Result<bool> {
        let lane = &mut self.lanes[peer];
        let mut moved = false;
        while lane.curious || lane.is_awaited() {
            let index = lane.take.index(self.cells);
            let cell = segment.cell(peer, self.me, index);
            if *budget == 0 {
                return Ok(moved);
            }
            let Some(frame) = lane.take.arrived(cell, self.cells) else {
                // A poll that has moved something is not the last before a sleep.
                return Ok(moved || lane.refuse(peer, segment, is_last, &self.copier));
            };
            lane.in_vain = 0;
            let len = frame.len as usize;
            let data = segment.cell_data(peer, self.me, index);
            if frame.offer != 0 {
                if lane.meet_offer(&frame, peer, data, segment, &self.copier)? {
                    self.taking.set(peer);
                }
                lane.take.release(cell, self.cells);
                moved = true;
                continue;
            }
            let mut incoming = lane.meet(&frame, peer, data.len())?;
            let data = data.slice(0, len);
            match &incoming.target {
                Target::Posted(message) => {
                    let place = message.region.slice(incoming.got, len);
                    Theirs::within(segment, self.hands_back).copy(place, data);
                }
                Target::Early => {
                    if let Some(Early { held: Held::Bytes(buffer), .. }) = lane.early.last_mut() {
                        buffer.append(data);
                    }
                }
            }
            lane.take.release(cell, self.cells);
            *budget = budget.saturating_sub(len.max(1));
            moved = true;
            incoming.got += len;
            if incoming.got < incoming.total {
                lane.incoming = Some(incoming);
            } else if let Target::Posted(message) = incoming.target {
                done.push(message.ctx);
            }
        }
        self.receiving.clear(peer);
        Ok(moved)
    }

    /// Peers that have to move before one of this rank's messages does.
    pub(crate) fn waiting_for(&self, segment: &Segment) -> impl Iterator<Item = usize> {
        let full = |peer: usize, lane: &Lane| {
            !lane.outgoing.is_empty()
                && !lane.put.is_free(segment.cell(self.me, peer, lane.put.index(self.cells)), self.cells)
        };
        let empty = |peer: usize, lane: &Lane| {
            let cell = segment.cell(peer, self.me, lane.take.index(self.cells));
            lane.is_awaited() && lane.take.arrived(cell, self.cells).is_none()
        };
        let straight = |peer: usize, lane: &Lane| {
            lane.given.iter().any(|one| self.copier.waits_to_give(segment, peer, one))
                || lane.taken.iter().any(|one| self.copier.waits_to_take(segment, peer, one))
        };
        let lanes = self.lanes.iter().enumerate();
        let waits = move |&(peer, lane): &(usize, &Lane)| {
            full(peer, lane) || empty(peer, lane) || straight(peer, lane)
        };
        lanes.filter(waits).map(|(peer, _)| peer)
    }
}

/// Behind a message: the lines of the next cell from one rank to another have gone to its reader's cache. `len` bytes of
/// them are called back now, when nobody waits for that (docs/adr/0020).
fn call_back_lines(segment: &Segment, (from, to): (usize, usize), next: Place, cells: usize, len: usize) {
    let index = next.index(cells);
    if next.is_free(segment.cell(from, to, index), cells) {
        segment.cell_data(from, to, index).slice(0, len).fetch_for_writing();
    }
}

impl Lane {
    /// Whether a posted receive still lacks bytes (S2).
    fn is_awaited(&self) -> bool {
        !self.posted.is_empty() || matches!(&self.incoming, Some(Incoming { target: Target::Posted(_), .. }))
    }

    /// Goes on with what this rank has offered; true when anything moved.
    fn give_straight(
        &mut self,
        peer: usize,
        segment: &Segment,
        copier: &mut Copier,
        budget: &mut usize,
        done: &mut Vec<Ctx>,
    ) -> bool {
        let mut moved = false;
        self.given.retain(|straight| {
            let outcome = copier.give(segment, peer, straight, budget);
            moved |= outcome != Outcome::Nothing;
            let Outcome::Over(end) = outcome else { return true };
            let message = straight.message;
            if end == End::Taken {
                done.push(message.ctx);
            } else {
                self.unable |= end == End::Unable;
                self.outgoing.push_back(Outgoing { message, sent: 0, refused: true });
            }
            false
        });
        moved
    }

    /// Goes on with what is being taken; true when anything moved.
    fn take_straight(
        &mut self,
        peer: usize,
        segment: &Segment,
        copier: &mut Copier,
        budget: &mut usize,
        done: &mut Vec<Ctx>,
    ) -> bool {
        let mut moved = false;
        self.taken.retain(|straight| {
            let outcome = copier.take(segment, peer, straight, budget);
            moved |= outcome != Outcome::Nothing;
            let Outcome::Over(end) = outcome else { return true };
            if end == End::Taken {
                done.push(straight.message.ctx);
            } else {
                // It comes through cells.
                self.posted.push(straight.message);
            }
            false
        });
        moved
    }

    /// Takes note of an offered message, and begins to take it if its receive is posted; true if so.
    fn meet_offer(
        &mut self,
        frame: &Frame,
        peer: usize,
        data: Region,
        segment: &Segment,
        copier: &Copier,
    ) -> Result<bool> {
        let deal = (frame.offer - 1) as usize;
        let mut known =
            self.taken.iter().map(|one| one.deal).chain(self.early.iter().filter_map(Early::deal));
        if self.incoming.is_some()
            || deal >= DEALS
            || frame.len as usize != OFFER
            || known.any(|other| other == deal)
        {
            return broken(frame, peer, "makes no sense");
        }
        let Ok(total) = usize::try_from(frame.total) else { return broken(frame, peer, "is too long") };
        let mut from = [0u8; OFFER];
        // SAFETY: `from` is this function's alone.
        unsafe { Region::of(&mut from) }.copy_from(data.slice(0, OFFER));
        let from = u64::from_ne_bytes(from);
        match self.posted_for(frame, total)? {
            Some(message) => {
                let straight = Straight { message, deal, from };
                copier.accept(segment, peer, &straight);
                self.taken.push(straight);
                Ok(true)
            }
            None => {
                let held = Held::Offer { deal, from };
                self.early.push(Early { key: frame.key, call: frame.call, total, held });
                Ok(false)
            }
        }
    }

    /// Nothing has come: refuses an offer that may be in the way of what is waited for (S3). True if it did.
    fn refuse(&mut self, peer: usize, segment: &Segment, is_last: bool, copier: &Copier) -> bool {
        let wanted = self.curious || !self.posted.is_empty();
        let Some((at, deal)) = self
            .early
            .iter()
            .enumerate()
            .find_map(|(at, early)| Some((at, early.deal()?)))
            .filter(|_| wanted)
        else {
            return false;
        };
        self.in_vain += 1;
        if self.in_vain < IN_VAIN && !is_last {
            return false;
        }
        self.in_vain = 0;
        self.early.remove(at);
        copier.refuse(segment, peer, deal);
        true
    }

    /// The message that `frame` belongs to, the frame checked against it.
    fn meet(&mut self, frame: &Frame, peer: usize, capacity: usize) -> Result<Incoming> {
        let broken = |what| broken(frame, peer, what);
        let Ok(total) = usize::try_from(frame.total) else { return broken("is too long") };
        let incoming = match self.incoming.take() {
            Some(incoming) if incoming.key == frame.key && incoming.total == total => incoming,
            Some(_) => return broken("does not continue its message"),
            None => {
                let target = self.target(frame, total)?;
                Incoming { target, key: frame.key, total, got: 0 }
            }
        };
        if frame.len as usize > capacity.min(total - incoming.got) {
            return broken("exceeds its cell or message");
        }
        Ok(incoming)
    }

    /// Where a message that begins goes.
    fn target(&mut self, frame: &Frame, total: usize) -> Result<Target> {
        if let Some(message) = self.posted_for(frame, total)? {
            return Ok(Target::Posted(message));
        }
        let held = Held::Bytes(Buffer::with_room_for(total)?);
        self.early.push(Early { key: frame.key, call: frame.call, total, held });
        Ok(Target::Early)
    }

    /// The posted receive that a message of `total` bytes which begins is for, taken out.
    fn posted_for(&mut self, frame: &Frame, total: usize) -> Result<Option<Message>> {
        let Some(at) = self.posted.iter().position(|m| m.key == frame.key) else { return Ok(None) };
        let message = self.posted.swap_remove(at);
        compare(&message, frame.call, total)?;
        Ok(Some(message))
    }
}

impl Early {
    /// The deal of one that is only offered.
    fn deal(&self) -> Option<usize> {
        match self.held {
            Held::Offer { deal, .. } => Some(deal),
            Held::Bytes(_) => None,
        }
    }
}

impl Straight {
    /// The frame that tells of it; its data is put into `data`.
    fn frame(&self, data: Region) -> Frame {
        let Straight { message, deal, from } = self;
        let mut address = from.to_ne_bytes();
        // SAFETY: `address` is this function's alone.
        data.slice(0, OFFER).copy_from(unsafe { Region::of(&mut address) });
        frame(message, OFFER, *deal as u32 + 1)
    }
}

/// One of `message`, with `len` bytes behind it.
fn frame(message: &Message, len: usize, offer: u32) -> Frame {
    let total = message.region.len() as u64;
    Frame { key: message.key, call: message.call, total, len: len as u32, offer }
}

fn broken<R>(frame: &Frame, peer: usize, what: &str) -> Result<R> {
    Err(Error::Transport {
        transport: "shared memory",
        reason: format!("local rank {peer} sent a frame that {what} ({frame:?})"),
    })
}

/// Whether what a peer sent is what this rank wants to receive.
fn compare(message: &Message, theirs: PackedCall, total: usize) -> Result<()> {
    let len = message.region.len();
    if theirs == message.call && total == len {
        return Ok(());
    }
    Err(Error::Mismatch {
        site: Site::of_call(message.call, message.key.number()),
        ours: format!("{}, receiving {len} bytes", message.call),
        peer: message.peer_rank as usize,
        theirs: format!("{theirs}, sending {total} bytes"),
    })
}

#[cfg(test)]
#[path = "messages_tests.rs"]
mod tests;
