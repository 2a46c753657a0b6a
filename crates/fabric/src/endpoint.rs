//! The endpoint: rails, peers and everything under way; [`Fabric`] for core.
//!
//! Small messages and all control go over rail 0, but answers to probes and to withdrawals over others as well where messages keep
//! their order (E9); pieces of large messages go over all rails.
//!
//! Invariants
//! - **E1** every posted receive slot is posted again as soon as its message was looked at; what nobody waits for
//!   yet is copied aside, at most as many messages as credits were given. So the pool never runs dry of slots that
//!   control messages need, whatever the number of peers.
//! - **E2** a message without credit is announced, and sent when its receive is posted: no order of posting on two
//!   sides can deadlock on credits.
//! - **E3** bounce slots are taken only for bytes that both sides are ready to move, so they always come back; those
//!   that a lost peer may still write to are replaced.
//! - **E4** arrivals are counted per transfer and per (group, peer), never "since": what an operation gets relies on no order (T2 of core's
//!   `transport`). Order, where there is one, serves to find losses alone (E9).
//! - **E5** a user's region is touched only for an operation in `sends` or `recvs`, when a small message is copied out or in, and
//!   by those in `pieces` (as source) and `grants` (as target).
//! - **E6** an endpoint that goes says [`Body::Bye`](crate::wire::Body::Bye) to whom it ever talked to, and closes when each has said
//!   it too: who has heard it sends nothing after its own. A packet that reaches a closed connection resets it, and what the
//!   process that sent it had not read yet would be thrown away: the last messages of one that was done (ADR 0031).
//! - **E7** an announcement may come after its receive is over, by a grant given before it; such news leaves nothing behind.
//! - **E8** a peer has few bytes of pieces in flight, whatever is granted: what is said to it waits for no more than those, and
//!   neither does who takes a group back.
//! - **E9** where messages keep their order, each tells how many went before it over its rail: one that was lost with a connection,
//!   which the provider makes again without a word, shows by the next. Probes are answered, over each rail
//!   that was written over, so that there is a next.
//! - **E10** one probe of a peer is under way at a time, until it is answered or may be lost: one that is slow to read finds few
//!   of them before what else is said to it.

use std::collections::VecDeque;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smddp_core::error::{Error as CoreError, Result, Site};
use smddp_core::memory::{Owner, Region};
use smddp_core::process;
use smddp_core::settings::Settings;
use smddp_core::transport::{Ctx, Fabric, FabricFailure, Message, MsgKey};

use crate::domain::{Armed, Caps, Completion, Domain, Refused};
use crate::error::Error;
use crate::groups::{Disagreement, Groups};
use crate::libfabric::LibfabricDomain;
use crate::map::{Map, map};
use crate::ops::{Early, InGrant, Match, OutGrant, Piece, Posted, RecvOp, SendOp, Settled, Tx};
use crate::peer::Peer;
use crate::slab::{Handle, Slab};
use crate::staging::{BOUNCE, Staging};
use crate::wire::{Address, Grant, MAX_RAILS};

/// Operations that are expected at once; more only cost an allocation.
const USUAL: usize = 1024;
/// How often the peers of stuck messages are probed; a message is stuck when it was there the last time already.
pub(crate) const PROBE_EVERY: Duration = Duration::from_millis(25);
/// Polls from one look at the clock to the next.
const CLOCK: u32 = 64;
/// The longest sleep: probes must go out, and refused posts be tried again.
const NAP: Duration = PROBE_EVERY;
/// How long the last messages may take to leave when the endpoint goes.
const LINGER: Duration = Duration::from_millis(200);
/// How long peers may take to part (E6): those that compute look for news every 100 ms.
const PARTING: Duration = Duration::from_millis(500);
/// Why nothing can be sent to or awaited from a peer that said goodbye.
pub(crate) const LEFT: &str = "it has left: its process groups are destroyed";
pub(crate) const DESTROYED: &str = "it has destroyed the group";
/// Largest piece of a message: large enough for full bandwidth, small enough to be few bytes (E8).
const PIECE: usize = 4 << 20;
/// Bytes of pieces in flight to one peer, on each rail.
const FLYING: usize = 8 << 20;
const BYE_NAP: Duration = Duration::from_millis(1);
const BLIND_NAP: Duration = Duration::from_micros(50);

/// What does not change after opening.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub uid: u64,
    pub provider: String,
    pub eager: usize,
    pub stripe: usize,
    /// Large messages are remote writes; else tagged.
    pub rma: bool,
    pub caps: Caps,
    pub max_piece: usize,
    /// Bytes of pieces in flight to one peer, at most.
    pub flying: usize,
}

/// Messages between processes over one or more NICs.
pub struct FabricEndpoint<D: Domain = LibfabricDomain> {
    pub(crate) rails: Vec<D>,
    pub(crate) config: Config,
    pub(crate) staging: Staging,
    pub(crate) peers: Vec<Peer>,
    pub(crate) by_uid: Map<u64, u32>,
    /// Messages of processes that `connect` has not named yet.
    pub(crate) strangers: Vec<(u64, usize, Vec<u8>)>,
    pub(crate) groups: Groups,

    pub(crate) sends: Slab<SendOp>,
    pub(crate) recvs: Slab<RecvOp>,
    pub(crate) outs: Slab<OutGrant>,
    pub(crate) pieces: Slab<Piece>,
    pub(crate) grants: Slab<InGrant>,
    /// Sends that wait for leave, receives that wait for data.
    pub(crate) sending: Map<Match, Handle>,
    pub(crate) receiving: Map<Match, Handle>,
    pub(crate) early: Map<Match, Early>,
    pub(crate) early_grants: Map<Match, (Grant, u64, smddp_core::call::PackedCall)>,
    /// Receives from a peer ever started here, by group and tag, of messages too large to come unasked.
    pub(crate) large: Map<(u32, u64, u64), u64>,
    /// Buffers for early data, used again.
    pub(crate) spare: Vec<Vec<u8>>,

    /// Small messages to send; grants with pieces to post; grants with tagged receives to post; receives that wait
    /// for bounce slots; receive slots to post again.
    pub(crate) tx: VecDeque<Tx>,
    pub(crate) work: VecDeque<Handle>,
    /// Some of those wait for what no completion tells of.
    pub(crate) is_refused: bool,
    pub(crate) posting: VecDeque<Handle>,
    pub(crate) starved: VecDeque<Handle>,
    pub(crate) unposted: Vec<u32>,
    /// What each small send in flight was: the peer, and whether a probe.
    pub(crate) slot_owner: Vec<(u32, bool)>,
    pub(crate) pass: u64,

    /// Marks of what is over, with their groups.
    pub(crate) done: Vec<(u64, Ctx)>,
    pub(crate) failures: VecDeque<FabricFailure>,
    pub(crate) completions: Vec<Completion>,
    /// How many completions of a rail, in this round, were about a probe, sent or come.
    pub(crate) probes: usize,
    pub(crate) broken: Option<String>,
    /// Heard while withdrawing.
    pub(crate) settled: Vec<Settled>,
    /// The group being withdrawn.
    pub(crate) settling: Option<u64>,
    pub(crate) credits_out: u32,
    pub(crate) polls: u32,
    pub(crate) probe_at: Duration,
    /// Where the next look goes on, in sends, receives and peers.
    pub(crate) probe_from: (usize, usize, usize),
}

impl<D: Domain> FabricEndpoint<D> {
    /// An endpoint over `domains`, one a rail, all alike; at most [`MAX_RAILS`] are used. `provider` is what peers
    /// must have in common.
    pub fn over_named(mut domains: Vec<D>, settings: &Settings, provider: &str) -> Result<Self, Error> {
        domains.truncate(MAX_RAILS);
        let Some(first) = domains.first() else {
            return Err(Error::NoNic {
                provider: provider.to_owned(),
                wanted: "at least one interface".to_owned(),
                offered: "none".to_owned(),
                hint: "Give one domain a rail",
            });
        };
        let caps = first.caps();
        let eager = settings.number("SMDDP_EAGER").min(caps.max_msg.saturating_sub(crate::wire::HEADER));
        let rma = caps.rma && settings.text("SMDDP_FABRIC_MODE") != "tagged";
        let piece = if caps.needs_local_mr { BOUNCE } else { PIECE };
        let config = Config {
            uid: random_identity()?,
            provider: provider.to_owned(),
            eager,
            stripe: settings.number("SMDDP_STRIPE"),
            rma,
            caps,
            max_piece: piece.min(caps.max_msg),
            flying: FLYING * domains.len(),
        };
        let staging = Staging::new(&mut domains, eager, settings.number("SMDDP_STAGING"))?;
        let slots = staging.recv.arena.count();
        let mut endpoint = FabricEndpoint {
            rails: domains,
            config,
            slot_owner: vec![(0, false); staging.send.arena.count()],
            staging,
            peers: Vec::new(),
            by_uid: map(64),
            strangers: Vec::new(),
            groups: Groups::new(),
            sends: Slab::with_capacity(USUAL),
            recvs: Slab::with_capacity(USUAL),
            outs: Slab::with_capacity(USUAL),
            pieces: Slab::with_capacity(USUAL),
            grants: Slab::with_capacity(USUAL),
            sending: map(USUAL),
            receiving: map(USUAL),
            early: map(USUAL),
            early_grants: map(USUAL),
            large: map(USUAL),
            spare: Vec::with_capacity(USUAL),
            tx: VecDeque::with_capacity(USUAL),
            work: VecDeque::with_capacity(USUAL),
            is_refused: false,
            posting: VecDeque::with_capacity(USUAL),
            starved: VecDeque::with_capacity(USUAL),
            unposted: Vec::with_capacity(slots),
            pass: 0,
            done: Vec::with_capacity(USUAL),
            failures: VecDeque::new(),
            completions: Vec::with_capacity(USUAL),
            broken: None,
            settled: Vec::new(),
            settling: None,
            credits_out: 0,
            polls: 0,
            probes: 0,
            probe_at: Duration::ZERO,
            probe_from: (0, 0, 0),
        };
        while let Some(slot) = endpoint.staging.recv.arena.take() {
            endpoint.unposted.push(slot);
        }
        endpoint.post_slots();
        Ok(endpoint)
    }

    /// As [`FabricEndpoint::over_named`], for domains without a provider's name.
    pub fn over(domains: Vec<D>, settings: &Settings) -> Result<Self, Error> {
        Self::over_named(domains, settings, "sim")
    }

    /// Posts the receive slots that are not.
    fn post_slots(&mut self) {
        while let Some(slot) = self.unposted.pop() {
            let slots = &self.staging.recv;
            let region = slots.arena.region(slot, crate::wire::HEADER + self.config.eager.max(1024));
            let rail = self.staging.rail_of(slot);
            match self.rails[rail].recv(region, slots.mrs[rail], Posted::Recv(slot).ctx()) {
                Ok(()) => {}
                Err(Refused::Again) => {
                    self.unposted.push(slot);
                    return;
                }
                Err(Refused::Peer(reason) | Refused::Broken(reason)) => {
                    self.unposted.push(slot);
                    return self.break_down(reason);
                }
            }
        }
    }

    /// One round over everything; true when anything moved but probes: who waits for long is not to become wide awake over
    /// those.
    pub(crate) fn progress(&mut self) -> bool {
        let (mut moved, mut is_quiet) = (false, true);
        for rail in 0..self.rails.len() {
            let mut completions = std::mem::take(&mut self.completions);
            if let Err(reason) = self.rails[rail].poll(&mut completions) {
                self.break_down(reason);
            }
            self.probes = 0;
            let all = completions.len();
            for completion in completions.drain(..) {
                self.complete(rail, completion);
            }
            moved |= all > self.probes;
            is_quiet &= all == 0;
            self.completions = completions;
            if self.broken.is_some() {
                return moved;
            }
        }
        self.post_slots();
        moved |= self.flush();
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(CLOCK) {
            self.probe(is_quiet);
        }
        moved
    }

    /// Posts whatever can be posted now.
    pub(crate) fn flush(&mut self) -> bool {
        let mut moved = self.feed_starved();
        moved |= self.post_tagged();
        moved |= self.send_small();
        moved | self.post_pieces()
    }

    /// The endpoint is of no use any more: every later call says so.
    pub(crate) fn break_down(&mut self, reason: String) {
        if self.broken.is_none() {
            tracing::error!(reason, "fabric endpoint closed");
            self.close();
            self.broken = Some(reason);
        }
    }

    fn close(&mut self) {
        let stuck = self.is_unsent() || self.pieces.iter().next().is_some();
        for domain in &mut self.rails {
            domain.close(stuck);
        }
    }

    /// Whether small messages are in the hands of the provider.
    fn is_unsent(&self) -> bool {
        self.staging.send.arena.free() < self.staging.send.arena.count()
    }

    fn broken_error(reason: &str) -> CoreError {
        CoreError::Transport {
            transport: "fabric",
            reason: format!("{reason}; the endpoint is closed: destroy the groups and initialise again"),
        }
    }

    /// Reports a failure of one group, once.
    pub(crate) fn fail_group(&mut self, group: u64, error: CoreError) {
        let Some(known) = self.groups.get_mut(group) else { return };
        if !known.failed {
            known.failed = true;
            self.failures.push_back(FabricFailure { group: Some(group), error });
        }
    }

    pub(crate) fn disagree(&mut self, group: u64, d: Disagreement) {
        let site = Site::of_call(d.ours, d.seq);
        self.mismatch(group, d.peer, site, d.ours.to_string(), d.theirs.to_string());
    }

    pub(crate) fn mismatch(&mut self, group: u64, peer: u32, site: Site, ours: String, theirs: String) {
        let rank = self.groups.rank_of(group, peer);
        let error = match rank {
            Some(rank) => CoreError::Mismatch { site, ours, peer: rank as usize, theirs },
            None => CoreError::Transport {
                transport: "fabric",
                reason: format!(
                    "ranks disagree: this rank called {ours}, {} called {theirs}. Every rank must make the same \
                     calls in the same order",
                    self.peers[peer as usize].label
                ),
            },
        };
        self.fail_group(group, error);
    }

    /// The peer broke the rules: nothing it says counts any more, but that groups end and settle.
    pub(crate) fn disown(&mut self, peer: u32, reason: String) {
        self.peers[peer as usize].wild = true;
        self.lose(peer, reason);
    }

    /// The peer cannot be reached any more: every group with messages to or from it fails.
    pub(crate) fn lose(&mut self, peer: u32, reason: String) {
        if self.peers[peer as usize].lost.is_some() {
            return;
        }
        self.reclaim_credits(peer);
        let p = &mut self.peers[peer as usize];
        let (sent, received, talked) = (p.sent, p.received, p.talked);
        tracing::warn!(peer = p.label, reason, talked, sent, received, "peer lost");
        p.lost = Some(reason);
        let mut hit: Vec<(u64, u32)> = Vec::new();
        let sends = self.sends.iter().filter(|(_, s)| !s.dead).map(|(_, s)| (s.id, s.rank));
        let recvs = self.recvs.iter().map(|(_, r)| (r.id, r.rank));
        for (id, rank) in sends.chain(recvs) {
            if id.peer == peer && !hit.iter().any(|(g, _)| *g == id.key.group) {
                hit.push((id.key.group, rank));
            }
        }
        for (group, rank) in hit {
            let error = self.lost_error(peer, rank);
            self.fail_group(group, error);
        }
    }

    fn lost_error(&self, peer: u32, rank: u32) -> CoreError {
        let p = &self.peers[peer as usize];
        CoreError::PeerLost {
            site: Site::unknown(),
            peer: rank as usize,
            node: p.label.clone(),
            reason: p.lost.clone().unwrap_or_else(|| LEFT.to_owned()),
        }
    }

    /// Checks common to `send` and `recv`. A disagreement, or an abort that came before the group was known, fails the group,
    /// not this call.
    fn admit(&mut self, m: &Message) -> Result<()> {
        if let Some(reason) = &self.broken {
            return Err(Self::broken_error(reason));
        }
        let Some(peer) = self.peers.get(m.peer as usize) else {
            return Err(CoreError::Internal(format!("message for unconnected peer {}", m.peer)));
        };
        if peer.lost.is_some() {
            return Err(self.lost_error(m.peer, m.peer_rank));
        }
        // Small ones are copied, which a device's memory must not be.
        if m.region.len() <= peer.eager && self.staging.is_on_device(m.region) {
            return Err(CoreError::Internal(format!(
                "a message of {} bytes in device memory",
                m.region.len()
            )));
        }
        if let Some(d) = self.groups.post(m.key, m.call, m.peer, m.peer_rank) {
            self.disagree(m.key.group, d);
        }
        if let Some(error) = self.aborted(m.key.group) {
            self.fail_group(m.key.group, error);
        }
        Ok(())
    }

    pub(crate) fn full(what: &str) -> CoreError {
        CoreError::Resource {
            what: format!("{what} over the fabric"),
            resource: "operations",
            reason: "65536 are under way".to_owned(),
            hint: "Wait for some of them".to_owned(),
        }
    }

    pub(crate) fn twice(m: &Message) -> CoreError {
        CoreError::Internal(format!("two messages with {:?} and peer {} at once", m.key, m.peer))
    }

    fn sleep(&mut self, limit: Duration) {
        let mut fds = [0; MAX_RAILS];
        let mut n = 0;
        for domain in &mut self.rails {
            match domain.arm() {
                Armed::Ready => return,
                Armed::Fd(fd) => {
                    fds[n] = fd;
                    n += 1;
                }
                Armed::Blind => return std::thread::sleep(limit.min(BLIND_NAP)),
            }
        }
        // There is a rail at least; the places of those there are not are not looked at.
        let first = fds[0];
        fds[n..].fill(first);
        // SAFETY: the descriptors belong to the domains' queues, which stay open while `self` is borrowed.
        let borrowed = fds.map(|fd| unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) });
        let mut entries = borrowed.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let _ = poll(&mut entries[..n], Some(&limit));
    }
}

impl<D: Domain> Fabric for FabricEndpoint<D> {
    fn address(&self) -> Vec<u8> {
        Address {
            uid: self.config.uid,
            eager: self.config.eager as u32,
            max_piece: self.config.max_piece as u64,
            rma: self.config.rma,
            bounces: self.config.caps.needs_local_mr,
            provider: self.config.provider.clone(),
            rails: self.rails.iter().map(|d| d.address().to_vec()).collect(),
        }
        .encode()
    }

    fn connect(&mut self, address: &[u8], label: &str) -> Result<u32> {
        if let Some(reason) = &self.broken {
            return Err(Self::broken_error(reason));
        }
        let wrong = |reason: &str| Error::Address { label: label.to_owned(), reason: reason.to_owned() };
        let address = Address::decode(address)
            .ok_or_else(|| wrong("not readable; all ranks must run the same version of this library"))?;
        if let Some(id) = self.by_uid.get(&address.uid) {
            return Ok(*id);
        }
        if address.provider != self.config.provider || address.rma != self.config.rma {
            let mode = |rma| if rma { "rma" } else { "tagged" };
            return Err(wrong(&format!(
                "it uses provider {} in mode {}, this process {} in mode {}; set SMDDP_PROVIDER and \
                 SMDDP_FABRIC_MODE alike on all nodes",
                address.provider,
                mode(address.rma),
                self.config.provider,
                mode(self.config.rma)
            ))
            .into());
        }
        let mut rails = Vec::with_capacity(self.rails.len());
        for (domain, name) in self.rails.iter_mut().zip(&address.rails) {
            rails.push(domain.insert(name)?);
        }
        let id = self.peers.len() as u32;
        self.peers.push(Peer::new(&address, label, rails, self.config.eager));
        self.by_uid.insert(address.uid, id);
        self.welcome(address.uid);
        Ok(id)
    }

    fn register(&mut self, memory: Region, owner: Owner) -> Result<()> {
        // Where registering is only bookkeeping, every transfer registers for itself, so that it can be revoked.
        let is_wanted = self.config.caps.needs_local_mr || owner != Owner::Host;
        if is_wanted && self.broken.is_none() {
            self.staging.register(&mut self.rails, memory, owner)?;
        }
        Ok(())
    }

    fn deregister(&mut self, memory: Region) {
        if self.broken.is_none() {
            self.staging.deregister(&mut self.rails, memory);
        }
    }

    fn least_device_message(&self) -> Option<usize> {
        let reaches = self.rails.iter().all(|rail| rail.caps().devices);
        // Never more to a peer than here (Peer::new).
        reaches.then_some(self.config.eager + 1)
    }

    fn send(&mut self, message: Message) -> Result<()> {
        self.admit(&message)?;
        if self.peers[message.peer as usize].left.is_some() {
            return Err(self.lost_error(message.peer, message.peer_rank));
        }
        self.start_send(&message)?;
        self.flush();
        Ok(())
    }

    fn recv(&mut self, message: Message) -> Result<()> {
        self.admit(&message)?;
        let is_here = |early: &Early| matches!(early, Early::Data { .. });
        let id = Match { peer: message.peer, key: message.key };
        if self.peers[message.peer as usize].left.is_some() && !self.early.get(&id).is_some_and(is_here) {
            return Err(self.lost_error(message.peer, message.peer_rank));
        }
        self.start_recv(&message)?;
        self.flush();
        Ok(())
    }

    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool {
        self.early.contains_key(&Match { peer, key: *key })
    }

    fn can_come(&mut self, group: u64, peer: u32, rank: u32) -> Result<bool> {
        let is_destroyed = self.groups.over_since(group, peer).is_some();
        let p = &mut self.peers[peer as usize];
        if !p.is_gone() {
            if !is_destroyed {
                p.ask(group);
            }
            return Ok(!self.is_over(group, peer));
        }
        // Where nobody says goodbye, and to those who were never met, whose work is done is lost like any other.
        let says_bye = self.config.caps.sockets && p.talked;
        let done = p.left.is_some() || is_destroyed || !(says_bye || p.wild);
        if done { Ok(false) } else { Err(self.lost_error(peer, rank)) }
    }

    fn aborted(&mut self, group: u64) -> Option<CoreError> {
        let (_, reason) = self.groups.get_mut(group)?.abort.take()?;
        Some(CoreError::Aborted { site: Site::unknown(), reason })
    }

    fn poll(&mut self, done: &mut Vec<Ctx>) -> std::result::Result<bool, FabricFailure> {
        let moved = self.broken.is_none() && self.progress();
        let any = !self.done.is_empty();
        done.extend(self.done.drain(..).map(|(_, ctx)| ctx));
        if let Some(failure) = self.failures.pop_front() {
            return Err(failure);
        }
        match &self.broken {
            Some(reason) => Err(FabricFailure { group: None, error: Self::broken_error(reason) }),
            None => Ok(moved || any),
        }
    }

    fn withdraw(&mut self, group: u64, peers: &[u32], why: Option<&CoreError>) {
        self.withdraw_group(group, peers, why);
    }

    fn waiting_for(&self, group: u64) -> Vec<usize> {
        let sends = self.sends.iter().filter(|(_, s)| !s.dead).map(|(_, s)| (s.id.key.group, s.rank));
        let recvs = self.recvs.iter().map(|(_, r)| (r.id.key.group, r.rank));
        let mut ranks: Vec<usize> =
            sends.chain(recvs).filter(|(g, _)| *g == group).map(|(_, rank)| rank as usize).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    fn doze(&mut self, limit: Duration) {
        if self.broken.is_some() || !self.done.is_empty() || !self.failures.is_empty() {
            return;
        }
        let waiting = !self.tx.is_empty() || self.is_refused || !self.unposted.is_empty();
        self.sleep(limit.min(if waiting { NAP / 25 } else { NAP }));
        self.polls |= CLOCK - 1;
    }

    fn traffic(&self) -> Vec<(u32, u64, u64)> {
        self.peers.iter().enumerate().map(|(id, p)| (id as u32, p.sent, p.received)).collect()
    }

    fn describe(&self) -> String {
        let rails: Vec<String> = self.rails.iter().map(Domain::describe).collect();
        format!(
            "{}; {} rail(s): {}; large messages: {}{}",
            self.config.provider,
            rails.len(),
            rails.join(", "),
            if self.config.rma { "remote writes" } else { "tagged" },
            if self.least_device_message().is_some() { "; reaches CUDA devices" } else { "" }
        )
    }
}

impl<D: Domain> Drop for FabricEndpoint<D> {
    /// Lets the last small messages out (their marks were reported when they were copied) and parts from the peers (E6), then
    /// closes the domains before the memory they were given goes.
    fn drop(&mut self) {
        let start = self.rails[0].now();
        if self.config.caps.sockets {
            (0..self.peers.len() as u32).for_each(|peer| self.tell_bye(peer));
        }
        loop {
            let waited = self.rails[0].now().saturating_sub(start);
            let unsent = self.is_unsent() || self.tx.iter().any(|news| self.is_awaited(news));
            let expected = self.peers.iter().any(Peer::owes_bye);
            if self.broken.is_some() || !(unsent && waited < LINGER || expected && waited < PARTING) {
                break;
            }
            if !self.progress() && expected {
                self.sleep(BYE_NAP);
            }
        }
        self.close();
    }
}

fn random_identity() -> Result<u64, Error> {
    process::random().map(u64::from_ne_bytes).map_err(|_| Error::Random)
}
