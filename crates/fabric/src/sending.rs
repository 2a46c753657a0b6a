//! Small messages out: the queue of things to say, slots and credits.

use std::time::Duration;

use smddp_core::call::PackedCall;
use smddp_core::error::{Error as CoreError, Result, Site};
use smddp_core::transport::{Message, MsgKey};

use crate::domain::{Domain, Refused};
use crate::endpoint::{DESTROYED, FabricEndpoint, LEFT, PROBE_EVERY};
use crate::ops::{Match, Posted, SendOp, Tx};
use crate::peer::Probe;
use crate::slab::Handle;
use crate::wire::{Body, HEADER, Packet, encode};

/// Slots kept free for control messages.
const KEPT: usize = 2;
/// The most slots one peer may hold, and the most when half of all are taken.
const PEER_SLOTS: usize = 24;
const FEW_SLOTS: usize = 4;
/// How long a message that waits for a peer which has left, or destroyed the group, may still be completed by what was under way.
pub(crate) const AFTERGLOW: Duration = Duration::from_secs(1);
/// Stuck messages whose peers are probed at a time.
const PROBES: usize = 16;

/// What became of one item of the queue.
enum Sent {
    Yes,
    /// Nothing to send any more.
    Void,
    Later,
}

pub(crate) const NO_KEY: MsgKey = MsgKey { group: 0, seq: 0, tag: 0 };
const NO_CALL: PackedCall = PackedCall { collective: 0, dtype: 0, op: 0, form: 0, root: 0, count: 0 };

impl<D: Domain> FabricEndpoint<D> {
    pub(crate) fn start_send(&mut self, m: &Message) -> Result<()> {
        let id = Match { peer: m.peer, key: m.key };
        let small = m.region.len() <= self.peers[m.peer as usize].eager;
        let bounces = self.peers[m.peer as usize].bounces;
        if self.sending.contains_key(&id) {
            return Err(Self::twice(m));
        }
        let Some(send) = self.sends.insert(SendOp::new(m)) else { return Err(Self::full("a send")) };
        let early = self.early_grants.remove(&id);
        self.peers[m.peer as usize].kept -= usize::from(early.is_some());
        if let Some((_, total, call)) = &early
            && !self.agree(id, (m.call, m.region.len()), (*call, *total))
        {
            return Ok(());
        }
        if small {
            self.tx.push_back(Tx::Eager { send, permitted: false });
            return Ok(());
        }
        self.sending.insert(id, send);
        match early {
            Some((grant, ..)) => self.accept(send, grant),
            // Point to point, the receiver may be waiting for whoever comes first.
            None if bounces || m.key.is_p2p() => self.tx.push_back(Tx::Announce { send }),
            None => {}
        }
        Ok(())
    }

    /// Compares a message's two sides; false (and the group failed) when they differ.
    pub(crate) fn agree(&mut self, id: Match, ours: (PackedCall, usize), theirs: (PackedCall, u64)) -> bool {
        if ours.0 == theirs.0 && ours.1 as u64 == theirs.1 {
            return true;
        }
        let say = |call: PackedCall, len: u64| {
            if ours.0 == theirs.0 {
                format!("{call} with a message of {len} bytes")
            } else {
                call.to_string()
            }
        };
        let site = Site::of_call(ours.0, id.key.number());
        self.mismatch(id.key.group, id.peer, site, say(ours.0, ours.1 as u64), say(theirs.0, theirs.1));
        false
    }

    pub(crate) fn send_small(&mut self) -> bool {
        let mut moved = false;
        self.pass += 1;
        for _ in 0..self.tx.len() {
            let Some(item) = self.tx.pop_front() else { break };
            match self.send_item(&item) {
                Sent::Yes => moved |= !item.is_probe(),
                Sent::Void => {}
                Sent::Later => self.tx.push_back(item),
            }
        }
        moved
    }

    fn send_item(&mut self, item: &Tx) -> Sent {
        match *item {
            Tx::Eager { send, permitted } => self.send_eager(send, permitted),
            Tx::Announce { send } => self.say_of_send(send, Body::Announce),
            Tx::ProbeSend { send, peer } => {
                let sent = self.say_of_send(send, Body::Probe { receiving: false });
                self.probed(peer, sent)
            }
            Tx::ProbeRecv { recv, peer } => {
                let sent = self.say_of_recv(recv, Body::Probe { receiving: true });
                self.probed(peer, sent)
            }
            Tx::ProbeAny { peer, group } => {
                // A number that no message has.
                let key = MsgKey { group, seq: u64::MAX, tag: 0 };
                let sent = self.say(peer, key, NO_CALL, 0, Body::Probe { receiving: false });
                self.probed(peer, sent)
            }
            Tx::Permit { recv } => self.say_of_recv(recv, Body::Permit),
            Tx::Grant { grant } => self.send_grant(grant),
            Tx::Credit { peer } => {
                let p = &mut self.peers[peer as usize];
                if !p.credits.worth_telling() {
                    p.credit_queued = false;
                    return Sent::Void;
                }
                let sent = self.say(peer, NO_KEY, NO_CALL, 0, Body::Credit { answer: false });
                if !matches!(sent, Sent::Later) {
                    self.peers[peer as usize].credit_queued = false;
                }
                sent
            }
            Tx::Answer { peer, rail } => {
                let answer = Body::Credit { answer: true };
                let sent = self.say_over(rail, peer, NO_KEY, NO_CALL, 0, answer);
                self.peers[peer as usize].answers -= usize::from(!matches!(sent, Sent::Later));
                sent
            }
            Tx::Abort { peer, group, quiet, ref text } => {
                let key = MsgKey { group, ..NO_KEY };
                self.say(peer, key, NO_CALL, 0, Body::Abort { quiet, text })
            }
            Tx::Settled { peer, group, rail, rails } => {
                let key = MsgKey { group, ..NO_KEY };
                let posted = self.groups.posted(group, peer);
                let settled = Body::Settled { rails: rails as u8 };
                self.say_over(rail, peer, key, NO_CALL, posted, settled)
            }
            Tx::Gone { peer, group } => {
                let key = MsgKey { group, ..NO_KEY };
                self.say(peer, key, NO_CALL, 0, Body::Gone)
            }
            Tx::Bye { peer } => self.say(peer, NO_KEY, NO_CALL, 0, Body::Bye),
        }
    }

    /// A probe that needs no sending any more frees its peer for the next.
    fn probed(&mut self, peer: u32, sent: Sent) -> Sent {
        let now = self.rails[0].now();
        let p = &mut self.peers[peer as usize];
        match sent {
            Sent::Yes => p.probed(now),
            Sent::Void => p.probe = Probe::None,
            Sent::Later => {}
        }
        sent
    }

    fn send_eager(&mut self, handle: Handle, permitted: bool) -> Sent {
        let Some(op) = self.sends.get(handle) else { return Sent::Void };
        let (id, call, region, ctx) = (op.id, op.call, op.region, op.ctx);
        let peer = &self.peers[id.peer as usize];
        if !permitted && !peer.credits.can_send() {
            let sent = self.say_of_send(handle, Body::Announce);
            if matches!(sent, Sent::Yes) {
                self.sending.insert(id, handle);
            }
            return sent;
        }
        // SAFETY: the region is the operation's until its mark is reported (core's R1 of `memory`, T1 of `transport`), which happens below.
        let data = unsafe { std::slice::from_raw_parts(region.as_ptr(), region.len()) };
        let sent = self.say(id.peer, id.key, call, region.len() as u64, Body::Eager { data, permitted });
        if matches!(sent, Sent::Yes) {
            let peer = &mut self.peers[id.peer as usize];
            if !permitted {
                peer.credits.spend();
            }
            peer.sent += region.len() as u64;
            self.sends.remove(handle);
            self.done.push((id.key.group, ctx));
        }
        sent
    }

    fn say_of_send(&mut self, handle: Handle, body: Body<'_>) -> Sent {
        let Some(op) = self.sends.get(handle) else { return Sent::Void };
        let announcing = body == Body::Announce;
        // A grant may have overtaken the wish to announce.
        if op.dead || (announcing && op.granted > 0) {
            return Sent::Void;
        }
        let (id, call, total) = (op.id, op.call, op.region.len() as u64);
        let sent = self.say(id.peer, id.key, call, total, body);
        if let (Sent::Yes, Some(op)) = (&sent, self.sends.get_mut(handle)) {
            op.announced |= announcing;
        }
        sent
    }

    fn say_of_recv(&mut self, handle: Handle, body: Body<'_>) -> Sent {
        let Some(op) = self.recvs.get(handle) else { return Sent::Void };
        let (id, call, total) = (op.id, op.call, op.region.len() as u64);
        self.say(id.peer, id.key, call, total, body)
    }

    fn send_grant(&mut self, handle: Handle) -> Sent {
        let Some(g) = self.grants.get(handle) else { return Sent::Void };
        if g.dead {
            return Sent::Void;
        }
        let (peer, key, call, total, grant) = (g.peer, g.key, g.call, g.total, g.grant);
        let sent = self.say(peer, key, call, total, Body::Grant(grant));
        if let (Sent::Yes, Some(g)) = (&sent, self.grants.get_mut(handle)) {
            g.sent = true;
        }
        sent
    }

    fn say(&mut self, to: u32, key: MsgKey, call: PackedCall, total: u64, body: Body<'_>) -> Sent {
        self.say_over(0, to, key, call, total, body)
    }

    /// Puts one packet into a slot and posts it.
    fn say_over(
        &mut self,
        rail: usize,
        to: u32,
        key: MsgKey,
        call: PackedCall,
        total: u64,
        body: Body<'_>,
    ) -> Sent {
        let peer = &mut self.peers[to as usize];
        // One that is lost here may be well, and wait.
        let is_news = matches!(body, Body::Abort { .. } | Body::Settled { .. } | Body::Gone);
        if (peer.lost.is_some() && !is_news) || (peer.left.is_some() && body != Body::Bye) {
            return Sent::Void;
        }
        let slots = &mut self.staging.send;
        let (all, free) = (slots.arena.count(), slots.arena.free());
        let are_kept = free <= KEPT && matches!(body, Body::Eager { .. });
        let is_full = rail == 0 && peer.full_in == self.pass;
        if are_kept || is_full || peer.small as usize >= share(all, free) {
            return Sent::Later;
        }
        let Some(slot) = slots.arena.take() else { return Sent::Later };
        let given = peer.credits.given();
        let packet = Packet { from: self.config.uid, given, number: peer.said[rail], key, call, total, body };
        let room = HEADER + self.config.eager.max(1024);
        let len = encode(&packet, slots.arena.bytes_mut(slot, room));
        let probe = matches!(body, Body::Probe { .. } | Body::Credit { answer: true });
        match self.rails[rail].send(
            peer.rails[rail],
            slots.arena.region(slot, len),
            slots.mrs[rail],
            Posted::Send(slot).ctx(),
        ) {
            Ok(()) => {
                peer.small += 1;
                peer.said[rail] = peer.said[rail].wrapping_add(1);
                peer.talked = true;
                // The connection that was lost is there again.
                peer.wild |= peer.lost.is_some();
                peer.credits.told(given);
                self.slot_owner[slot as usize] = (to, probe);
                Sent::Yes
            }
            Err(refused) => {
                slots.arena.give(slot);
                match refused {
                    Refused::Again => {
                        if rail == 0 {
                            peer.full_in = self.pass;
                        }
                        Sent::Later
                    }
                    Refused::Peer(reason) => {
                        self.lose(to, reason);
                        Sent::Void
                    }
                    Refused::Broken(reason) => {
                        self.break_down(reason);
                        Sent::Void
                    }
                }
            }
        }
    }

    /// A small send is over.
    pub(crate) fn sent_small(&mut self, slot: u32) -> u32 {
        let (peer, probe) = self.slot_owner[slot as usize];
        self.staging.send.arena.give(slot);
        self.peers[peer as usize].small -= 1;
        self.probes += usize::from(probe);
        peer
    }

    /// Now and then asks the peers of stuck messages. A dead peer shows by its connection, one that called
    /// something else by its answer. `is_quiet`: nothing lies in the queues that might complete them.
    pub(crate) fn probe(&mut self, is_quiet: bool) {
        let now = self.rails[0].now();
        if now < self.probe_at {
            return;
        }
        self.probe_at = now + PROBE_EVERY;
        let (mut send, mut recv, asked) = self.probe_from;
        for _ in 0..PROBES {
            let Some((handle, next)) = self.sends.after(send) else {
                send = 0;
                break;
            };
            send = next;
            let Some(op) = self.sends.get_mut(handle) else { continue };
            let (id, rank, peer) = (op.id, op.rank, op.id.peer);
            if std::mem::replace(&mut op.old, true) && !op.dead && !(is_quiet && self.is_in_vain(id, rank)) {
                self.probe_one(peer, Tx::ProbeSend { send: handle, peer });
            }
        }
        for _ in 0..PROBES {
            let Some((handle, next)) = self.recvs.after(recv) else {
                recv = 0;
                break;
            };
            recv = next;
            let Some(op) = self.recvs.get_mut(handle) else { continue };
            let (id, rank, peer) = (op.id, op.rank, op.id.peer);
            if std::mem::replace(&mut op.old, true) && !(is_quiet && self.is_in_vain(id, rank)) {
                self.probe_one(peer, Tx::ProbeRecv { recv: handle, peer });
            }
        }
        self.probe_from = (send, recv, self.probe_asked(asked));
        self.probe_settling();
        self.send_small();
    }

    /// Probes peers that receives from any rank wait for, from number `from` on; where to go on the next time.
    fn probe_asked(&mut self, from: usize) -> usize {
        let (all, mut probes, now) = (self.peers.len(), 0, self.rails[0].now());
        for at in (from..from + all).map(|at| at % all) {
            let p = &mut self.peers[at];
            if probes == PROBES {
                return at;
            }
            if p.left.is_none()
                && p.is_to_probe(now)
                && let Some(group) = p.take_asked()
            {
                probes += 1;
                let peer = at as u32;
                self.probe_one(peer, Tx::ProbeAny { peer, group });
            }
        }
        0
    }

    /// Probes those whose pieces a withdrawn group waits for: no message of its asks for them any more.
    fn probe_settling(&mut self) {
        let Some(group) = self.settling else { return };
        for peer in self.unsettled(group) {
            self.probe_one(peer, Tx::ProbeAny { peer, group });
        }
    }

    /// Whether the peer has destroyed the group, and what was under way then has had its time.
    pub(crate) fn is_over(&self, group: u64, peer: u32) -> bool {
        let since = self.groups.over_since(group, peer);
        since.is_some_and(|since| self.rails[0].now().saturating_sub(since) >= AFTERGLOW)
    }

    /// Whether a stuck message's peer has destroyed the group, which then fails.
    fn is_in_vain(&mut self, id: Match, rank: u32) -> bool {
        if !self.is_over(id.key.group, id.peer) {
            return false;
        }
        let error = CoreError::PeerLost {
            site: Site::unknown(),
            peer: rank as usize,
            node: self.peers[id.peer as usize].label.clone(),
            reason: DESTROYED.to_owned(),
        };
        self.fail_group(id.key.group, error);
        true
    }

    fn probe_one(&mut self, peer: u32, item: Tx) {
        let (p, now) = (&mut self.peers[peer as usize], self.rails[0].now());
        match p.left {
            // What its NICs had taken may still arrive for a while.
            Some(since) if now.saturating_sub(since) >= AFTERGLOW => {
                self.lose(peer, LEFT.to_owned());
            }
            None if p.is_to_probe(now) && p.lost.is_none() => {
                p.probe = Probe::Queued;
                self.tx.push_back(item);
            }
            _ => {}
        }
    }
}

/// How many slots a peer may hold when so many of all are free: one that has stopped reading does not give its back, and the
/// fewer there are the more peers may need one.
fn share(all: usize, free: usize) -> usize {
    match free {
        _ if free > all / 2 => PEER_SLOTS.min(all / 4),
        _ if free > all / 4 => FEW_SLOTS,
        _ => 1,
    }
}

/// Cuts a text for a packet's payload at a character's border.
pub(crate) fn cut(text: &str, room: usize) -> &str {
    let mut end = text.len().min(room);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
