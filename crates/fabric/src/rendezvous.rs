//! Large messages: the receiver grants, the sender posts pieces over all rails, the receiver counts them.
//!
//! Where registering is bookkeeping (tcp), a receive is granted whole as soon as it is posted, in memory registered
//! for this transfer alone under a key never used again. Where it is real (EFA), registered staging is granted
//! whole; other memory through bounce slots, once the sender has announced the message (E3).

use crate::domain::{Domain, Mr, Refused, Remote};
use crate::endpoint::FabricEndpoint;
use crate::ops::{InGrant, Match, OutGrant, Piece, Posted, Tx};
use crate::slab::Handle;
use crate::staging::BOUNCE;
use crate::wire::{Grant, MAX_RAILS, Packet, Target, piece_of};
use smddp_core::memory::{Owner, Region};

/// Bounce slots one receive may hold at once: one lands while the other is copied out.
const BOUNCES: usize = 2;

impl<D: Domain> FabricEndpoint<D> {
    // The receiver's side.

    /// Grants what can be granted of a posted receive.
    pub(crate) fn grant_more(&mut self, recv: Handle) {
        let Some(op) = self.recvs.get(recv) else { return };
        let (region, granted, announced) = (op.region, op.granted, op.announced);
        let direct = !self.config.caps.needs_local_mr || self.staging.find(region, 0).is_some();
        if direct && granted == 0 {
            self.grant(recv, region, None);
        } else if announced {
            // Also what was registered since it began to go through slots.
            self.grant_bounced(recv);
        }
    }

    fn grant_bounced(&mut self, recv: Handle) {
        loop {
            let Some(op) = self.recvs.get_mut(recv) else { return };
            let (granted, len) = (op.granted, op.region.len());
            if granted == len || granted - op.arrived >= BOUNCES * BOUNCE {
                return;
            }
            let Some((_, slots)) = &mut self.staging.bounce else { return };
            let Some(slot) = slots.arena.take() else {
                if !op.starved {
                    op.starved = true;
                    self.starved.push_back(recv);
                }
                return;
            };
            let into = slots.arena.region(slot, BOUNCE.min(len - granted));
            self.grant(recv, into, Some(slot));
        }
    }

    /// Receives that wait for bounce slots, in turn.
    pub(crate) fn feed_starved(&mut self) -> bool {
        let mut fed = false;
        while self.staging.bounce.as_ref().is_some_and(|(_, slots)| slots.arena.free() > 0) {
            let Some(recv) = self.starved.pop_front() else { break };
            if let Some(op) = self.recvs.get_mut(recv) {
                op.starved = false;
                self.grant_bounced(recv);
                fed = true;
            }
        }
        fed
    }

    /// Grants `into.len()` bytes from where the receive's grants end, to land in `into`.
    fn grant(&mut self, recv: Handle, into: Region, bounce: Option<u32>) {
        let Some(op) = self.recvs.get_mut(recv) else { return };
        let (id, call, total, off) = (op.id, op.call, op.region.len(), op.granted);
        op.granted += into.len();
        let peer = &self.peers[id.peer as usize];
        let span = into.len() as u64;
        let rails = into.len().div_ceil(self.config.stripe).clamp(1, self.rails.len().min(peer.rails.len()));
        let limit = peer.max_piece.min(self.config.max_piece as u64).max(1);
        let piece = piece_of(span, rails as u8, limit);
        let mut grant = Grant {
            id: 0,
            off: off as u64,
            span,
            piece,
            rails: rails as u8,
            tagged: !self.config.rma,
            targets: [Target::default(); MAX_RAILS],
        };
        let mut mrs = [None; MAX_RAILS];
        if self.config.rma {
            for (rail, (target, mr)) in grant.targets.iter_mut().zip(&mut mrs).enumerate().take(rails) {
                match self.target(rail, into, bounce) {
                    Ok(found) => (*target, *mr) = found,
                    Err(reason) => return self.break_down(reason),
                }
            }
        }
        let entry = InGrant {
            recv,
            peer: id.peer,
            group: id.key.group,
            key: id.key,
            call,
            total: total as u64,
            grant,
            into,
            bounce,
            mrs,
            posted: 0,
            left: grant.pieces(),
            bytes: 0,
            sent: false,
            dead: false,
        };
        match self.grants.insert(entry) {
            Some(handle) => {
                if let Some(g) = self.grants.get_mut(handle) {
                    g.grant.id = handle;
                }
                if self.config.rma {
                    self.tx.push_back(Tx::Grant { grant: handle });
                } else {
                    self.posting.push_back(handle);
                }
            }
            None => self.fail_group(id.key.group, Self::full("a receive")),
        }
    }

    /// What a peer must name on `rail` to write into `into`, and the registration made for it, if any was.
    fn target(
        &mut self,
        rail: usize,
        into: Region,
        bounce: Option<u32>,
    ) -> Result<(Target, Option<Mr>), String> {
        if let (Some(slot), Some((_, slots))) = (bounce, &self.staging.bounce) {
            let mr = slots.mrs[rail];
            return Ok((Target { addr: mr.base + slots.arena.offset(slot) as u64, key: mr.key }, None));
        }
        if let Some((mr, offset)) = self.staging.find(into, rail) {
            return Ok((Target { addr: mr.base + offset as u64, key: mr.key }, None));
        }
        let mr = self.rails[rail].register(into, Owner::Host, true).map_err(|e| e.to_string())?;
        Ok((Target { addr: mr.base, key: mr.key }, Some(mr)))
    }

    /// Posts the tagged receives of new grants; a grant goes out after its last one (its data must find them).
    pub(crate) fn post_tagged(&mut self) -> bool {
        let mut moved = false;
        for _ in 0..self.posting.len() {
            let Some(handle) = self.posting.pop_front() else { break };
            let Some(g) = self.grants.get_mut(handle) else { continue };
            while g.posted < g.grant.pieces() && !g.dead {
                let (start, len) = g.grant.range(g.posted);
                let region = g.into.slice(start - g.grant.off as usize, len);
                let rail = g.grant.rail(g.posted);
                let mr = match (&self.staging.bounce, g.bounce) {
                    (Some((_, slots)), Some(_)) => Some(slots.mrs[rail]),
                    _ => self.staging.find(region, rail).map(|(mr, _)| mr),
                };
                let ctx = Posted::Tagged(handle).ctx();
                match self.rails[rail].tagged_recv(region, mr, g.grant.tag(g.posted), ctx) {
                    Ok(()) => g.posted += 1,
                    Err(Refused::Again) => break,
                    Err(Refused::Peer(reason) | Refused::Broken(reason)) => {
                        self.break_down(reason);
                        return moved;
                    }
                }
                moved = true;
            }
            if g.dead {
                continue;
            }
            if g.posted < g.grant.pieces() {
                self.posting.push_back(handle);
            } else {
                self.tx.push_back(Tx::Grant { grant: handle });
            }
        }
        moved
    }

    /// A piece of transfer `handle` is in memory (E4); `len` where the provider tells.
    pub(crate) fn piece_arrived(&mut self, handle: Handle, len: Option<usize>) {
        let Some(g) = self.grants.get_mut(handle) else {
            tracing::warn!(handle, "a piece of an unknown transfer arrived");
            return;
        };
        self.groups.member(g.group, g.peer).arrived += 1;
        self.peers[g.peer as usize].pieces += 1;
        g.left = g.left.saturating_sub(1);
        g.bytes += len.unwrap_or(0);
        if g.left > 0 {
            return;
        }
        let (peer, short) = (g.peer, len.is_some() && g.bytes as u64 != g.grant.span && !g.dead);
        if short {
            self.disown(peer, "it sent less than was agreed".to_owned());
        } else {
            self.finish_grant(handle);
        }
    }

    /// One tagged receive of the transfer will not be filled any more.
    pub(crate) fn tagged_gone(&mut self, handle: Handle) {
        let Some(g) = self.grants.get_mut(handle) else { return };
        g.left = g.left.saturating_sub(1);
        if g.left == 0 && g.dead {
            self.finish_grant(handle);
        }
    }

    /// All of the transfer is in place, or it is given up: frees what it held.
    pub(crate) fn finish_grant(&mut self, handle: Handle) {
        let Some(g) = self.grants.remove(handle) else { return };
        for (domain, mr) in self.rails.iter_mut().zip(&g.mrs) {
            if let Some(mr) = mr {
                domain.deregister(*mr);
            }
        }
        let (off, span) = (g.grant.off as usize, g.grant.span as usize);
        let op = if g.dead { None } else { self.recvs.get_mut(g.recv) };
        if let Some(op) = op {
            if g.bounce.is_some() {
                op.region.slice(off, span).copy_from(g.into);
            }
            op.arrived += span;
            self.peers[g.peer as usize].received += g.grant.span;
        }
        if let (Some(slot), Some((_, slots))) = (g.bounce, &mut self.staging.bounce) {
            slots.arena.give(slot);
        }
        if g.dead {
            return;
        }
        match self.recvs.get(g.recv) {
            Some(op) if op.arrived == op.region.len() => {
                let (id, ctx, announced) = (op.id, op.ctx, op.announced);
                self.recvs.remove(g.recv);
                self.receiving.remove(&id);
                if self.config.caps.needs_local_mr && !announced {
                    self.peers[id.peer as usize].over_unannounced(id.key);
                }
                self.done.push((id.key.group, ctx));
            }
            Some(_) => self.grant_more(g.recv),
            None => {}
        }
    }

    // The sender's side.

    pub(crate) fn granted(&mut self, id: Match, packet: &Packet<'_>, grant: Grant) {
        let Some(&send) = self.sending.get(&id) else {
            if !self.early_grants.contains_key(&id) && self.may_keep(id.peer) {
                self.early_grants.insert(id, (grant, packet.total, packet.call));
            }
            return;
        };
        let Some(op) = self.sends.get(send) else { return };
        let ours = (op.call, op.region.len());
        if self.agree(id, ours, (packet.call, packet.total)) {
            self.accept(send, grant);
        }
    }

    /// Takes a grant for a send whose length and call agree with the receiver's.
    pub(crate) fn accept(&mut self, send: Handle, grant: Grant) {
        let Some(op) = self.sends.get_mut(send) else { return };
        let (id, len) = (op.id, op.region.len());
        let fits = grant.off as usize + grant.span as usize <= len
            && op.granted + grant.span as usize <= len
            && usize::from(grant.rails) <= self.peers[id.peer as usize].rails.len()
            && grant.piece.min(grant.span) <= self.config.max_piece as u64
            && grant.tagged != self.config.rma;
        if !fits {
            return self.disown(id.peer, format!("it granted what cannot be: {grant:?}"));
        }
        op.granted += grant.span as usize;
        let out = OutGrant { send, peer: id.peer, group: id.key.group, grant, next: 0 };
        match self.outs.insert(out) {
            Some(handle) => self.work.push_back(handle),
            None => self.fail_group(id.key.group, Self::full("a send")),
        }
    }

    /// Posts pieces of granted sends, each grant as far as it goes.
    pub(crate) fn post_pieces(&mut self) -> bool {
        let mut moved = false;
        self.is_refused = false;
        for _ in 0..self.work.len() {
            let Some(handle) = self.work.pop_front() else { break };
            match self.post_grant(handle) {
                Some((any, more)) => {
                    moved |= any;
                    if more {
                        self.work.push_back(handle);
                    }
                }
                None => continue,
            }
        }
        moved
    }

    /// (anything posted, pieces left to post) of one grant; `None` when it is over.
    fn post_grant(&mut self, handle: Handle) -> Option<(bool, bool)> {
        let mut moved = false;
        loop {
            let out = self.outs.get(handle)?;
            let (send, peer, group, grant, p) = (out.send, out.peer, out.group, out.grant, out.next);
            let to = &self.peers[peer as usize];
            // Nothing follows our goodbye (E6).
            if p == grant.pieces() || to.lost.is_some() || to.told_bye {
                self.outs.remove(handle);
                return Some((moved, false));
            }
            let region = self.sends.get(send)?.region;
            let (start, len) = grant.range(p);
            if to.flying > 0 && to.flying + len > self.config.flying {
                return Some((moved, true));
            }
            let (rail, from) = (grant.rail(p), region.slice(start, len));
            let Some((from, mr, bounce)) = self.source(from, rail) else { return Some((moved, true)) };
            let Some(piece) = self.pieces.insert(Piece { send, peer, len, bounce }) else {
                self.give_source(bounce);
                return Some((moved, true));
            };
            let address = self.peers[peer as usize].rails[rail];
            let ctx = Posted::Piece(piece).ctx();
            let posted = if grant.tagged {
                self.rails[rail].tagged_send(address, from, mr, grant.tag(p), ctx)
            } else {
                let Target { addr, key } = grant.targets[rail];
                let addr = addr.wrapping_add((start as u64).wrapping_sub(grant.off));
                self.rails[rail].write(Remote { peer: address, addr, key }, from, mr, grant.id, ctx)
            };
            if let Err(refused) = posted {
                self.pieces.remove(piece);
                self.give_source(bounce);
                match refused {
                    Refused::Again => {
                        self.is_refused = true;
                        return Some((moved, true));
                    }
                    Refused::Peer(reason) => self.lose(peer, reason),
                    Refused::Broken(reason) => self.break_down(reason),
                }
                return None;
            }
            moved = true;
            self.groups.member(group, peer).posted += 1;
            let to = &mut self.peers[peer as usize];
            to.flying += len;
            if !grant.tagged {
                to.said[rail] = to.said[rail].wrapping_add(1);
                to.used = to.used.max(if self.config.caps.ordered { rail + 1 } else { 1 });
            }
            self.sends.get_mut(send)?.flying += 1;
            self.outs.get_mut(handle)?.next += 1;
        }
    }

    /// What to post for the bytes of `from`: themselves where no registration is needed or they lie in registered
    /// memory, else a copy in a bounce slot; `None` when none is free.
    fn source(&mut self, from: Region, rail: usize) -> Option<(Region, Option<Mr>, Option<u32>)> {
        if let Some((mr, _)) = self.staging.find(from, rail) {
            return Some((from, Some(mr), None));
        }
        let Some((slots, _)) = self.staging.bounce.as_mut() else { return Some((from, None, None)) };
        let slot = slots.arena.take()?;
        let copy = slots.arena.region(slot, from.len());
        copy.copy_from(from);
        Some((copy, Some(slots.mrs[rail]), Some(slot)))
    }

    fn give_source(&mut self, bounce: Option<u32>) {
        if let (Some(slot), Some((slots, _))) = (bounce, &mut self.staging.bounce) {
            slots.arena.give(slot);
        }
    }

    /// A piece is out of our hands (`good`), or failed.
    pub(crate) fn piece_done(&mut self, handle: Handle, good: bool) {
        let Some(piece) = self.pieces.remove(handle) else {
            tracing::warn!(handle, "completion of an unknown piece");
            return;
        };
        self.give_source(piece.bounce);
        let to = &mut self.peers[piece.peer as usize];
        to.flying -= piece.len;
        to.pieces += u64::from(good);
        let Some(op) = self.sends.get_mut(piece.send) else { return };
        op.flying -= 1;
        if good {
            op.written += piece.len;
            self.peers[piece.peer as usize].sent += piece.len as u64;
        }
        if op.dead {
            if op.flying == 0 {
                self.sends.remove(piece.send);
            }
        } else if op.written == op.region.len() {
            let (id, ctx) = (op.id, op.ctx);
            self.sends.remove(piece.send);
            self.sending.remove(&id);
            self.done.push((id.key.group, ctx));
        }
    }
}
