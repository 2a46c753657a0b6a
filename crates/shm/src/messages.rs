//! Messages between the ranks of a node, matched by [`MsgKey`] in whatever order sends and receives are posted.
//!
//! - **S1** A sender puts whole messages into a pair's cells one after another, so a cell needs no offset, and only
//!   the first frame of a message can meet a receive.
//! - **S2** Cells from a peer are taken out only while a receive from that peer is posted. Taking out what is not yet wanted
//!   (into a buffer of the message's size) lets receives be posted in any order. A lane somebody asked about in vain is
//!   emptied as if one were posted, until the next poll is over.

use std::collections::VecDeque;

use smddp_core::call::PackedCall;
use smddp_core::error::Site;
use smddp_core::transport::{Ctx, Message, MsgKey};
use smddp_core::{Error, Result};

use crate::buffer::Buffer;
use crate::layout::{Frame, Memory};
use crate::mask::Mask;
use crate::pair::Place;
use crate::pen::Pen;
use crate::segment::Segment;

struct Outgoing {
    message: Message,
    sent: usize,
}

/// A message that came before its receive. The last of a lane may still be arriving.
struct Early {
    key: MsgKey,
    call: PackedCall,
    total: usize,
    buffer: Buffer,
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
    take: Place,
    posted: Vec<Message>,
    incoming: Option<Incoming>,
    early: Vec<Early>,
    /// Asked about since the last poll.
    curious: bool,
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
    /// Peers with something to send to, and to receive from.
    sending: Mask,
    receiving: Mask,
    /// Receives that were complete when they were posted.
    complete: Vec<Ctx>,
}

impl Messages {
    pub(crate) fn new(me: usize, segment: &Segment, pen: Pen, hands_back: bool) -> Messages {
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
            complete: Vec::new(),
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.sending.is_empty() && self.receiving.is_empty() && self.complete.is_empty()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        for lane in &mut self.lanes {
            *lane = Lane { put: lane.put, take: lane.take, ..Lane::default() };
        }
        (self.sending, self.receiving) = (Mask::default(), Mask::default());
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
        self.lanes[peer].outgoing.push_back(Outgoing { message, sent: 0 });
        self.sending.set(peer);
        Ok(())
    }

    pub(crate) fn recv(&mut self, message: Message) -> Result<()> {
        let peer = self.check(&message)?;
        let lane = &mut self.lanes[peer];
        let Some(at) = lane.early.iter().position(|early| early.key == message.key) else {
            lane.posted.push(message);
            self.receiving.set(peer);
            return Ok(());
        };
        // Ordered, so that one that is still arriving stays last.
        let mut early = lane.early.remove(at);
        compare(&message, early.call, early.total)?;
        let got = early.buffer.len();
        message.region.slice(0, got).copy_from(early.buffer.region());
        match &mut lane.incoming {
            Some(incoming) if incoming.key == message.key => {
                incoming.target = Target::Posted(message);
                self.receiving.set(peer);
            }
            _ => self.complete.push(message.ctx),
        }
        Ok(())
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

    /// Moves what can be moved; true when anything did.
    pub(crate) fn poll(&mut self, segment: &Segment, done: &mut Vec<Ctx>) -> Result<bool> {
        let mut moved = !self.complete.is_empty();
        done.append(&mut self.complete);
        let mut budget = self.budget;
        for peer in self.sending.iter() {
            moved |= self.put(peer, segment, done, &mut budget);
        }
        let mut budget = self.budget;
        for peer in self.receiving.iter() {
            moved |= self.take(peer, segment, done, &mut budget)?;
            self.lanes[peer].curious = false;
        }
        Ok(moved)
    }

    /// Fills cells to `peer`.
    fn put(&mut self, peer: usize, segment: &Segment, done: &mut Vec<Ctx>, budget: &mut usize) -> bool {
        let lane = &mut self.lanes[peer];
        let mut moved = false;
        while let Some(Outgoing { message, sent }) = lane.outgoing.front_mut() {
            let index = lane.put.index(self.cells);
            let cell = segment.cell(self.me, peer, index);
            if *budget == 0 || !lane.put.is_free(cell, self.cells) {
                return moved;
            }
            let data = segment.cell_data(self.me, peer, index);
            let len = (message.region.len() - *sent).min(data.len());
            self.pen.write(data.slice(0, len), message.region.slice(*sent, len), !self.hands_back);
            let frame = Frame {
                key: message.key,
                call: message.call,
                total: message.region.len() as u64,
                len: len as u32,
                reserved: 0,
            };
            lane.put.publish(cell, self.cells, frame);
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

    /// Empties cells from `peer`.
    fn take(
        &mut self,
        peer: usize,
        segment: &Segment,
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
            let Some(frame) = lane.take.arrived(cell, self.cells) else { return Ok(moved) };
            let len = frame.len as usize;
            let data = segment.cell_data(peer, self.me, index);
            let mut incoming = lane.meet(&frame, peer, data.len())?;
            let data = data.slice(0, len);
            match &incoming.target {
                Target::Posted(message) => {
                    let place = message.region.slice(incoming.got, len);
                    if self.hands_back { place.take_from(data) } else { place.copy_from(data) }
                }
                Target::Early => {
                    if let Some(early) = lane.early.last_mut() {
                        early.buffer.append(data);
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
            self.sending.has(peer)
                && !lane.put.is_free(segment.cell(self.me, peer, lane.put.index(self.cells)), self.cells)
        };
        let empty = |peer: usize, lane: &Lane| {
            let cell = segment.cell(peer, self.me, lane.take.index(self.cells));
            lane.is_awaited() && lane.take.arrived(cell, self.cells).is_none()
        };
        let lanes = self.lanes.iter().enumerate();
        lanes.filter(move |(peer, lane)| full(*peer, lane) || empty(*peer, lane)).map(|(peer, _)| peer)
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

    /// The message that `frame` belongs to, the frame checked against it.
    fn meet(&mut self, frame: &Frame, peer: usize, capacity: usize) -> Result<Incoming> {
        let broken = |what: &str| {
            Err(Error::Transport {
                transport: "shared memory",
                reason: format!("local rank {peer} sent a frame that {what} ({frame:?})"),
            })
        };
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
        if let Some(at) = self.posted.iter().position(|m| m.key == frame.key) {
            let message = self.posted.swap_remove(at);
            compare(&message, frame.call, total)?;
            return Ok(Target::Posted(message));
        }
        let buffer = Buffer::with_room_for(total)?;
        self.early.push(Early { key: frame.key, call: frame.call, total, buffer });
        Ok(Target::Early)
    }
}

/// Whether what a peer sent is what this rank wants to receive.
fn compare(message: &Message, theirs: PackedCall, total: usize) -> Result<()> {
    let len = message.region.len();
    if theirs == message.call && total == len {
        return Ok(());
    }
    Err(Error::Mismatch {
        site: Site::unknown(),
        ours: format!("{}, receiving {len} bytes", message.call),
        peer: message.peer_rank as usize,
        theirs: format!("{theirs}, sending {total} bytes"),
    })
}
