//! Completions and small messages in: decoding, judging, matching.

use smddp_core::call::PackedCall;
use smddp_core::error::{Error as CoreError, Result, Site};
use smddp_core::memory::Region;
use smddp_core::transport::Message;

use crate::domain::{Completion, Domain};
use crate::endpoint::FabricEndpoint;
use crate::groups::Verdict;
use crate::ops::{Early, Match, Posted, RecvOp, Settled, Tx};
use crate::peer::WINDOW;
use crate::slab::Handle;
use crate::wire::{Body, Packet, decode};

/// Messages of processes not connected yet that are kept; more are dropped with a warning.
const STRANGERS: usize = 16_384;
/// Messages and grants of one peer that wait for their operation to be posted here. No more than so many operations can be
/// under way there; one that has more waiting runs wild.
const EARLY: usize = 65_536;

impl<D: Domain> FabricEndpoint<D> {
    pub(crate) fn start_recv(&mut self, m: &Message) -> Result<()> {
        let id = Match { peer: m.peer, key: m.key };
        if self.receiving.contains_key(&id) {
            return Err(Self::twice(m));
        }
        let early = self.early.remove(&id);
        self.peers[m.peer as usize].kept -= usize::from(early.is_some());
        if let Some(Early::Data { bytes, call, permitted }) = early {
            self.take_early(id, m, bytes, call, permitted);
            return Ok(());
        }
        let Some(handle) = self.recvs.insert(RecvOp::new(m)) else { return Err(Self::full("a receive")) };
        self.receiving.insert(id, handle);
        let large = m.region.len() > self.peers[m.peer as usize].eager;
        if large && m.key.is_p2p() {
            let started = self.large.entry((m.peer, m.key.group, m.key.tag)).or_insert(0);
            *started = (*started).max(m.key.number() + 1);
        }
        match early {
            Some(Early::Announced { total, call }) => self.announced(handle, total, call),
            _ if large => self.grant_more(handle),
            _ => {}
        }
        Ok(())
    }

    /// Whether a message was announced whose receive was started, granted and perhaps over before it: nothing is kept
    /// of such news (E7). Where registering is real, a receive that was started may still wait for the announcement, so
    /// those that are over are kept by name.
    fn is_old_news(&mut self, id: &Match, total: u64) -> bool {
        if self.config.caps.needs_local_mr {
            return self.peers[id.peer as usize].is_late(&id.key);
        }
        let started = || self.large.get(&(id.peer, id.key.group, id.key.tag)).copied().unwrap_or(0);
        id.key.is_p2p() && total > self.peers[id.peer as usize].eager as u64 && id.key.number() < started()
    }

    /// The message was here before its receive.
    fn take_early(&mut self, id: Match, m: &Message, bytes: Vec<u8>, call: PackedCall, permitted: bool) {
        if self.agree(id, (m.call, m.region.len()), (call, bytes.len() as u64)) {
            copy_in(&bytes, m.region);
            self.done.push((m.key.group, m.ctx));
        }
        self.peers[id.peer as usize].received += bytes.len() as u64;
        self.recycle(bytes);
        if !permitted {
            self.consumed(id.peer);
        }
    }

    pub(crate) fn recycle(&mut self, mut bytes: Vec<u8>) {
        bytes.clear();
        self.spare.push(bytes);
    }

    /// A message on credit was taken off the sender's account; tells it when that is worth a packet.
    pub(crate) fn consumed(&mut self, peer: u32) {
        self.peers[peer as usize].credits.consume();
        self.news(peer);
    }

    pub(crate) fn complete(&mut self, rail: usize, completion: Completion) {
        match completion {
            Completion::Done { ctx, len } => match Posted::from_ctx(ctx) {
                Some(Posted::Send(slot)) => {
                    self.sent_small(slot);
                }
                Some(Posted::Recv(slot)) => {
                    self.arrive_small(rail, slot, len);
                    self.unposted.push(slot);
                }
                Some(Posted::Piece(piece)) => self.piece_done(piece, true),
                Some(Posted::Tagged(grant)) => self.piece_arrived(grant, Some(len)),
                None => tracing::warn!(ctx, "completion of an unknown operation"),
            },
            Completion::Arrived { data } => {
                if let Some(g) = self.grants.get(data) {
                    let heard = &mut self.peers[g.peer as usize].heard[rail];
                    *heard = heard.wrapping_add(1);
                }
                self.piece_arrived(data, None);
            }
            Completion::Failed { ctx, data, peer, canceled, reason } => {
                let by_address = peer.and_then(|address| {
                    self.peers.iter().position(|p| p.rails.get(rail) == Some(&address)).map(|p| p as u32)
                });
                let of_write = data.and_then(|id| self.grants.get(id)).map(|g| g.peer);
                let of_op = ctx.and_then(Posted::from_ctx).and_then(|op| self.failed_op(op, canceled));
                match of_op.or(of_write).or(by_address) {
                    Some(peer) => self.lose(peer, reason),
                    None => tracing::debug!(rail, reason, "an operation failed; its peer is not known"),
                }
            }
        }
    }

    /// Takes back what a failed operation held; the peer it shows to be lost.
    fn failed_op(&mut self, op: Posted, canceled: bool) -> Option<u32> {
        match op {
            Posted::Send(slot) => Some(self.sent_small(slot)),
            Posted::Recv(slot) => {
                self.unposted.push(slot);
                None
            }
            Posted::Piece(piece) => {
                let peer = self.pieces.get(piece).map(|p| p.peer);
                self.piece_done(piece, false);
                peer
            }
            Posted::Tagged(handle) => {
                let grant = self.grants.get(handle)?;
                let (peer, expected) = (grant.peer, grant.dead && canceled);
                self.tagged_gone(handle);
                if expected { None } else { Some(peer) }
            }
        }
    }

    fn arrive_small(&mut self, rail: usize, slot: u32, len: usize) {
        // SAFETY: the slot's receive is over (D2) and it is posted again only after this function; the arena lives
        // as long as the endpoint. The slice is separate from everything `self` touches meanwhile.
        let bytes = unsafe {
            let region = self.staging.recv.arena.region(slot, len);
            std::slice::from_raw_parts(region.as_ptr().cast_const(), len)
        };
        self.read(rail, bytes);
    }

    /// Looks at one message, from a slot or kept of a stranger.
    fn read(&mut self, rail: usize, bytes: &[u8]) {
        let Some(packet) = decode(bytes) else {
            tracing::warn!(
                len = bytes.len(),
                "a message that is not ours, or of another version, was dropped"
            );
            return;
        };
        let Some(peer) = self.by_uid.get(&packet.from).copied() else {
            if self.strangers.len() < STRANGERS {
                self.strangers.push((packet.from, rail, bytes.to_vec()));
            } else {
                tracing::warn!(from = packet.from, "too many messages of unknown processes; one was dropped");
            }
            return;
        };
        self.peers[peer as usize].talked = true;
        self.peers[peer as usize].credits.hear(packet.given);
        self.count(peer, rail, packet.number);
        self.take(peer, rail, &packet);
    }

    /// Where messages come in order, notices that some did not (E9).
    fn count(&mut self, peer: u32, rail: usize, number: u32) {
        let p = &mut self.peers[peer as usize];
        let lost = number.wrapping_sub(p.heard[rail]) as i32;
        p.heard[rail] = p.heard[rail].wrapping_add(1);
        if self.config.caps.ordered && lost > 0 && p.lost.is_none() {
            self.disown(peer, format!("a connection broke, and {lost} message(s) were lost with it"));
        }
    }

    /// A process got known: what it said before counts now.
    pub(crate) fn welcome(&mut self, uid: u64) {
        if !self.strangers.iter().any(|(from, ..)| *from == uid) {
            return;
        }
        let mut kept = std::mem::take(&mut self.strangers);
        kept.retain(|(from, rail, bytes)| {
            if *from == uid {
                self.read(*rail, bytes);
            }
            *from != uid
        });
        self.strangers = kept;
    }

    /// Whether one more thing of the peer's may be kept, which then counts; it is disowned otherwise.
    pub(crate) fn may_keep(&mut self, peer: u32) -> bool {
        let p = &mut self.peers[peer as usize];
        if p.kept < EARLY {
            p.kept += 1;
            return true;
        }
        self.disown(peer, format!("more than {EARLY} of its messages wait for an operation here"));
        false
    }

    fn take(&mut self, peer: u32, rail: usize, packet: &Packet<'_>) {
        // Its groups must still be able to settle with it.
        let settles = matches!(packet.body, Body::Abort { .. } | Body::Settled { .. });
        if self.peers[peer as usize].wild && !settles {
            return;
        }
        match packet.body {
            Body::Credit { answer } => {
                self.probes += usize::from(answer);
                if answer {
                    self.peers[peer as usize].answered();
                }
                return;
            }
            Body::Bye => return self.heard_bye(peer),
            Body::Abort { quiet, text } => return self.aborted(peer, packet.key.group, quiet, text),
            Body::Settled { rails } => {
                if self.settling == Some(packet.key.group) {
                    self.settled.push(Settled { peer, rail, rails: rails.into(), posted: packet.total });
                }
                return;
            }
            Body::Gone => {
                let now = self.rails[0].now();
                self.probes += 1;
                self.peers[peer as usize].answered();
                return self.groups.is_over_at(packet.key.group, peer, now);
            }
            Body::Eager { .. } | Body::Announce | Body::Permit | Body::Grant(_) | Body::Probe { .. } => {}
        }
        if matches!(packet.body, Body::Probe { .. }) {
            self.answer(peer);
        }
        let costs = matches!(packet.body, Body::Eager { permitted: false, .. });
        if costs && !self.peers[peer as usize].credits.take() {
            return self.disown(peer, "it sent more than it was allowed to".to_owned());
        }
        if matches!(packet.body, Body::Announce) {
            self.open_window(peer);
        }
        match self.groups.arrive(packet.key, packet.call, peer) {
            Verdict::Take => self.deliver(peer, packet),
            Verdict::Drop => {
                if costs {
                    self.consumed(peer);
                }
                self.tell_gone(peer, packet);
            }
            Verdict::Disagree(d) => {
                if costs {
                    self.consumed(peer);
                }
                self.disagree(packet.key.group, d);
            }
        }
    }

    /// Over every rail that was written over: what was lost on one of them shows there alone.
    fn answer(&mut self, peer: u32) {
        let p = &mut self.peers[peer as usize];
        if p.answers == 0 {
            p.answers = p.used;
            self.tx.extend((0..p.used).map(|rail| Tx::Answer { peer, rail }));
        }
    }

    /// Who waits for this process in a group that is destroyed here waits in vain. (One packet a probe: there are few.)
    fn tell_gone(&mut self, peer: u32, packet: &Packet<'_>) {
        let group = packet.key.group;
        if matches!(packet.body, Body::Announce | Body::Probe { .. }) && self.groups.is_gone(group) {
            self.tx.push_back(Tx::Gone { peer, group });
        }
        if matches!(packet.body, Body::Probe { .. }) {
            self.probes += 1;
        }
    }

    fn deliver(&mut self, peer: u32, packet: &Packet<'_>) {
        let id = Match { peer, key: packet.key };
        match packet.body {
            Body::Eager { data, permitted } => self.arrive_eager(id, packet.call, data, permitted),
            Body::Announce => match self.receiving.get(&id).copied() {
                Some(recv) => self.announced(recv, packet.total, packet.call),
                None if self.is_old_news(&id, packet.total) => {}
                None => {
                    if !self.early.contains_key(&id) && self.may_keep(peer) {
                        self.early.insert(id, Early::Announced { total: packet.total, call: packet.call });
                    }
                }
            },
            Body::Permit => {
                if let Some(send) = self.sending.remove(&id) {
                    match self.sends.get(send) {
                        Some(op) if op.announced && op.region.len() <= self.peers[peer as usize].eager => {
                            self.tx.push_back(Tx::Eager { send, permitted: true });
                        }
                        _ => {
                            self.sending.insert(id, send);
                        }
                    }
                }
            }
            Body::Grant(grant) => self.granted(id, packet, grant),
            Body::Probe { receiving } => self.probed_by(id, packet, receiving),
            Body::Credit { .. } | Body::Abort { .. } | Body::Settled { .. } | Body::Gone | Body::Bye => {}
        }
    }

    fn arrive_eager(&mut self, id: Match, call: PackedCall, data: &[u8], permitted: bool) {
        if let Some(handle) = self.receiving.remove(&id)
            && let Some(op) = self.recvs.get(handle)
        {
            let (region, ours, ctx) = (op.region, op.call, op.ctx);
            if !permitted {
                self.consumed(id.peer);
            }
            if !self.agree(id, (ours, region.len()), (call, data.len() as u64)) {
                self.receiving.insert(id, handle);
                return;
            }
            copy_in(data, region);
            self.recvs.remove(handle);
            let p = &mut self.peers[id.peer as usize];
            p.received += data.len() as u64;
            self.done.push((id.key.group, ctx));
            return;
        }
        if !self.may_keep(id.peer) {
            return;
        }
        let mut bytes = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(self.config.eager));
        bytes.extend_from_slice(data);
        if self.early.insert(id, Early::Data { bytes, call, permitted }).is_some() {
            self.peers[id.peer as usize].kept -= 1;
        }
    }

    /// The peer's endpoint goes, and waits for our word that nothing more will be sent to it (E6).
    fn heard_bye(&mut self, peer: u32) {
        let now = self.rails[0].now();
        self.reclaim_credits(peer);
        self.peers[peer as usize].left.get_or_insert(now);
        self.tell_bye(peer);
    }

    /// The last packet to the peer, unless that is under way.
    pub(crate) fn tell_bye(&mut self, peer: u32) {
        let p = &mut self.peers[peer as usize];
        if p.talked && p.lost.is_none() && !std::mem::replace(&mut p.told_bye, true) {
            self.tx.push_back(Tx::Bye { peer });
        }
    }

    /// Lets a peer send unasked, as far as there is room for what might stay unexpected.
    fn open_window(&mut self, peer: u32) {
        let room = self.staging.budget - self.credits_out;
        let p = &mut self.peers[peer as usize];
        if p.credits.window() == 0 && room > 0 && !p.is_gone() {
            let window = WINDOW.min(room);
            p.credits.open(window);
            self.credits_out += window;
            self.news(peer);
        }
    }

    /// The peer is about to be gone: what it may have sent unasked is for others. (What of it still lies here goes with its
    /// groups.)
    pub(crate) fn reclaim_credits(&mut self, peer: u32) {
        let p = &self.peers[peer as usize];
        if !p.is_gone() {
            self.credits_out -= p.credits.window();
        }
    }

    /// Tells a peer its credits if they are news.
    fn news(&mut self, peer: u32) {
        let p = &mut self.peers[peer as usize];
        if p.credits.worth_telling() && !p.credit_queued {
            p.credit_queued = true;
            self.tx.push_back(Tx::Credit { peer });
        }
    }

    /// The sender of a posted receive waits for leave.
    fn announced(&mut self, recv: Handle, total: u64, call: PackedCall) {
        let Some(op) = self.recvs.get_mut(recv) else { return };
        let (id, ours, len, before) = (op.id, op.call, op.region.len(), op.announced);
        op.announced = true;
        if before || !self.agree(id, (ours, len), (call, total)) {
            return;
        }
        if len <= self.peers[id.peer as usize].eager {
            self.tx.push_back(Tx::Permit { recv });
        } else {
            self.grant_more(recv);
        }
    }

    /// A peer waits long: do both sides mean the same message?
    fn probed_by(&mut self, id: Match, packet: &Packet<'_>, receiving: bool) {
        self.probes += 1;
        let ours = if receiving {
            self.sending.get(&id).and_then(|h| self.sends.get(*h)).map(|s| (s.call, s.region.len()))
        } else {
            self.receiving.get(&id).and_then(|h| self.recvs.get(*h)).map(|r| (r.call, r.region.len()))
        };
        if let Some(ours) = ours {
            self.agree(id, ours, (packet.call, packet.total));
        }
    }

    /// A peer's group failed, or was only withdrawn (`quiet`): nothing more of ours goes to it for that group.
    fn aborted(&mut self, peer: u32, group: u64, quiet: bool, text: &str) {
        self.drop_outs(group, Some(peer));
        let rails = self.peers[peer as usize].used;
        self.tx.extend((0..rails).map(|rail| Tx::Settled { peer, group, rail, rails }));
        self.early_grants.retain(|id, _| {
            let goes = id.peer == peer && id.key.group == group;
            self.peers[id.peer as usize].kept -= usize::from(goes);
            !goes
        });
        if self.groups.is_gone(group) {
            return;
        }
        let (known, rank) = (self.groups.known(group), self.groups.rank_of(group, peer));
        let entry = self.groups.note_left(group, peer);
        if quiet {
            return;
        }
        let label = &self.peers[peer as usize].label;
        let from = rank.map_or_else(|| label.clone(), |r| format!("rank {r} ({label})"));
        let reason = format!("{from} failed: {text}");
        if known {
            self.fail_group(group, CoreError::Aborted { site: Site::unknown(), reason });
        } else {
            entry.abort.get_or_insert((peer, reason));
        }
    }
}

/// Copies received bytes into a posted region of the same length.
fn copy_in(bytes: &[u8], into: Region) {
    assert_eq!(bytes.len(), into.len(), "lengths were compared before");
    // SAFETY: the region is the receive's (core's R1 of `memory`, T1 of `transport`) and as long as the source (checked); the source is a slot or a
    // buffer of ours, which no user region overlaps.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into.as_ptr(), bytes.len()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smddp_core::settings::Settings;
    use smddp_core::transport::{Ctx, Fabric, MsgKey};
    use smddp_core::{Call, Collective, DType};

    use super::*;
    use crate::sending::NO_KEY;
    use crate::sim::{SimConfig, SimNet};
    use crate::wire::{Grant, MAX_RAILS, Target, encode};

    /// One packet of a peer that says anything at all about a few operations.
    fn packets() -> impl Strategy<Value = Vec<u8>> {
        let sizes = prop::sample::select(vec![0u64, 1, 100, 8192, 8193, 50_000, u64::MAX]);
        let key = (0..2u64, 0..3u64, 0..4u64).prop_map(|(group, seq, tag)| MsgKey { group, seq, tag });
        let targets = any::<[(u64, u64); MAX_RAILS]>();
        let grant = (any::<u32>(), 0..60_000u64, 0..60_000u64, 1..60_000u64, 1..9u8, any::<bool>(), targets);
        let data = prop::collection::vec(any::<u8>(), 0..200);
        (0..10u8, key, 0..3u64, sizes, grant, data, any::<(bool, u32)>()).prop_map(
            |(kind, key, count, total, g, data, (flag, given))| {
                let (id, off, span, piece, rails, tagged, targets) = g;
                let targets = targets.map(|(addr, key)| Target { addr, key });
                let body = match kind {
                    0 => Body::Eager { data: &data, permitted: flag },
                    1 => Body::Announce,
                    2 => Body::Permit,
                    3 | 4 => {
                        Body::Grant(Grant { id, off, span, piece, rails: rails.min(8), tagged, targets })
                    }
                    5 => Body::Probe { receiving: flag },
                    6 => Body::Abort { quiet: flag, text: "why" },
                    7 => Body::Bye,
                    8 => Body::Gone,
                    _ => Body::Settled { rails: flag.into() },
                };
                let total = if kind == 0 { data.len() as u64 } else { total };
                let call = Call::new(Collective::AllReduce, DType::U8, count).pack();
                let mut bytes = vec![0; crate::wire::HEADER + 400];
                let len =
                    encode(&Packet { from: 42, given, number: given, key, call, total, body }, &mut bytes);
                bytes.truncate(len);
                bytes
            },
        )
    }

    /// An endpoint, and peers that exist by name alone, from 40 on.
    fn among(peers: u64) -> (FabricEndpoint<crate::sim::SimDomain>, SimNet) {
        let net = SimNet::new(SimConfig::default());
        let mut me = FabricEndpoint::over(vec![net.domain()], &Settings::default()).unwrap();
        for uid in 40..40 + peers {
            let address = crate::wire::Address {
                uid,
                eager: 8192,
                max_piece: 1 << 20,
                rma: true,
                bounces: false,
                provider: "sim".to_owned(),
                rails: vec![net.domain().address().to_vec()],
            };
            assert_eq!(u64::from(me.connect(&address.encode(), "named").unwrap()), uid - 40);
        }
        (me, net)
    }

    fn say(
        me: &mut FabricEndpoint<crate::sim::SimDomain>,
        from: u64,
        key: MsgKey,
        total: u64,
        body: Body<'_>,
    ) {
        let call = Call::new(Collective::AllReduce, DType::U8, 1).pack();
        let mut bytes = vec![0; crate::wire::HEADER + 400];
        let len = encode(&Packet { from, given: 0, number: 0, key, call, total, body }, &mut bytes);
        me.read(0, &bytes[..len]);
    }

    fn letter(n: u64) -> MsgKey {
        MsgKey { group: 5, seq: MsgKey::P2P | n, tag: 0 }
    }

    #[test]
    fn who_sends_more_than_is_kept_is_disowned_and_nobody_else() {
        let (mut me, _net) = among(3);
        for n in 0..EARLY as u64 {
            say(&mut me, 40, letter(n), 100, Body::Announce);
        }
        say(&mut me, 41, letter(0), 100, Body::Announce);
        assert!(me.has_come(1, &letter(0)));
        // What leaves nothing behind is no matter.
        say(&mut me, 40, letter(7), 100, Body::Announce);
        say(&mut me, 40, letter(8), 100, Body::Probe { receiving: true });
        // What was taken makes room.
        let mut memory = [0u8; 100];
        // SAFETY: the buffer outlives the endpoint's use of it.
        let region = unsafe { Region::of(&mut memory) };
        let call = Call::new(Collective::AllReduce, DType::U8, 1).pack();
        let key = letter(3);
        me.recv(Message { key, peer: 0, peer_rank: 0, region, call, ctx: Ctx(0) }).unwrap();
        say(&mut me, 40, letter(EARLY as u64), 100, Body::Announce);
        assert!(me.peers.iter().all(|p| p.lost.is_none()));
        say(&mut me, 40, letter(EARLY as u64 + 1), 100, Body::Announce);
        assert!(me.peers[0].wild && me.peers[1].lost.is_none() && me.peers[2].lost.is_none());
    }

    #[test]
    fn a_disowned_peer_is_not_listened_to() {
        let (mut me, _net) = among(1);
        // It was given no credit.
        say(&mut me, 40, letter(0), 4, Body::Eager { data: &[1; 4], permitted: false });
        assert!(me.peers[0].wild);
        say(&mut me, 40, letter(1), 4, Body::Eager { data: &[1; 4], permitted: true });
        say(&mut me, 40, letter(2), 4, Body::Announce);
        say(&mut me, 40, NO_KEY, 0, Body::Bye);
        assert!(me.early.is_empty() && me.peers[0].left.is_none());
    }

    /// It may write again into what the endpoint has not taken back.
    #[test]
    fn a_lost_peer_that_is_reached_again_has_to_settle() {
        let (mut me, _net) = among(2);
        me.lose(0, "its connection is gone".to_owned());
        me.lose(1, "its connection is gone".to_owned());
        assert!(me.peers.iter().all(|p| !p.wild));
        me.withdraw(5, &[0], Some(&CoreError::Internal("over".to_owned())));
        me.poll(&mut Vec::new()).unwrap();
        assert!(me.peers[0].wild && !me.peers[1].wild);
    }

    /// The peer's memory is its own again as soon as it has our word; a grant that was overtaken by the abort is void.
    #[test]
    fn a_grant_that_its_abort_overtook_is_void_however_many_groups_there_are() {
        let (mut me, _net) = among(2);
        let mut memory = vec![0u8; 100_000];
        // SAFETY: the buffer outlives the endpoint's use of it.
        let region = unsafe { Region::of(&mut memory) };
        let call = Call::new(Collective::AllReduce, DType::U8, 1).pack();
        let post = |group| {
            let key = MsgKey { group, seq: 0, tag: 0 };
            Message { key, peer: 0, peer_rank: 0, region, call, ctx: Ctx(0) }
        };
        for group in 100..100 + 5000 {
            me.send(post(group)).unwrap();
        }
        let key = MsgKey { group: 5, seq: 0, tag: 0 };
        say(&mut me, 40, key, 0, Body::Abort { quiet: true, text: "" });
        let targets = [Target::default(); MAX_RAILS];
        let grant = Grant { id: 1, off: 0, span: 100_000, piece: 100_000, rails: 1, tagged: false, targets };
        say(&mut me, 40, key, 100_000, Body::Grant(grant));
        me.send(post(5)).unwrap();
        assert_eq!(me.pieces.iter().count(), 0);
    }

    proptest! {
        /// A peer may say what it likes: nothing panics, and no byte outside the posted regions changes.
        #[test]
        fn no_peer_can_do_harm(
            said in prop::collection::vec(packets(), 1..60), seed: u64, rma: bool, real: bool,
            ids in prop::collection::vec((any::<u32>(), any::<bool>()), 0..20),
        ) {
            let config = SimConfig { seed, rma, needs_local_mr: real, virt_addr: real, ..SimConfig::default() };
            let net = SimNet::new(config);
            let (domains, end) = (vec![net.domain(), net.domain()], net.domain());
            let mut me = FabricEndpoint::over(domains, &Settings::default()).unwrap();
            let address = crate::wire::Address {
                uid: 42, eager: 8192, max_piece: 1 << 20, rma, bounces: real, provider: "sim".to_owned(),
                rails: vec![end.address().to_vec(); 2],
            };
            let peer = me.connect(&address.encode(), "wild").unwrap();
            let mut memory = vec![0xabu8; 200_000];
            // SAFETY: the buffer outlives the endpoint's use of it: it is withdrawn, or the endpoint dropped, first.
            let whole = unsafe { Region::of(&mut memory) };
            let mut at = 100;
            for (i, len) in [0, 100, 8192, 8193, 50_000].into_iter().enumerate() {
                let key = MsgKey { group: 0, seq: i as u64 % 3, tag: i as u64 % 4 };
                let call = Call::new(Collective::AllReduce, DType::U8, 1).pack();
                let region = whole.slice(at, len);
                let m = Message { key, peer, peer_rank: 1, region, call, ctx: Ctx(0) };
                let _ = if (seed >> i) & 1 == 0 { me.send(m) } else { me.recv(m) };
                at += len + 100;
            }
            let mut done = Vec::new();
            for (i, bytes) in said.iter().enumerate() {
                me.read(0, bytes);
                if let Some((id, tagged)) = ids.get(i) {
                    me.piece_arrived(*id & 0x1_0003, tagged.then_some(4096));
                }
                let _ = me.poll(&mut done);
            }
            for _ in 0..100 { let _ = me.poll(&mut done); }
            drop(me);
            let mut at = 0;
            for len in [0, 100, 8192, 8193, 50_000] {
                prop_assert!(memory[at..at + 100].iter().all(|b| *b == 0xab));
                at += 100 + len;
            }
            prop_assert!(memory[at..].iter().all(|b| *b == 0xab));
        }
    }
}
