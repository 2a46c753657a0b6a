//! Taking a group back: afterwards nothing touches its regions (T1 of core's `transport`).
//!
//! Bytes in flight are not ours to stop, so both sides settle: we say that the group is over; each peer posts no
//! more for it and answers with how many it ever posted (E4). When as many have arrived, none is on its way; where its answer comes
//! behind them all, none is in any case, whatever a broken connection has lost. A peer that does not answer
//! in [`SETTLE`], and moves no pieces either, costs the endpoint, and so does one that still moves pieces after [`SETTLE_MOVING`]: closing
//! it is what certainly ends all access. One that has died, or left, is found by probes.

use std::sync::Arc;
use std::time::Duration;

use smddp_core::error::Error as CoreError;

use crate::domain::Domain;
use crate::endpoint::{FabricEndpoint, LEFT};
use crate::ops::{Early, Posted, Settled, Tx};
use crate::sending::{AFTERGLOW, cut};
use crate::slab::Handle;

/// How long peers may take to settle, since a piece last moved; they only need to poll.
const SETTLE: Duration = Duration::from_secs(2);
/// How long that may last in all.
const SETTLE_MOVING: Duration = Duration::from_secs(20);
/// How long the news of a failure may take to be posted when nothing else is waited for.
const NEWS: Duration = Duration::from_millis(50);
/// Bytes of an abort's text.
const TEXT: usize = 1000;

impl<D: Domain> FabricEndpoint<D> {
    pub(crate) fn withdraw_group(&mut self, group: u64, peers: &[u32], why: Option<&CoreError>) {
        self.groups.withdraw(group);
        self.failures.retain(|f| f.group != Some(group));
        // What its marks mean may be something else as soon as this returns.
        self.done.retain(|(of, _)| *of != group);
        if self.broken.is_some() {
            return self.forget_all(group);
        }
        self.forget_unsent(group);
        let mut told: Vec<u32> = if why.is_some() { peers.to_vec() } else { Vec::new() };
        told.extend(self.unsettled(group));
        told.sort_unstable();
        told.dedup();
        told.retain(|p| self.peers.get(*p as usize).is_some_and(|p| p.left.is_none()));
        let text: Arc<str> = why.map(|e| Arc::from(cut(&e.to_string(), TEXT))).unwrap_or_default();
        for &peer in &told {
            // Should it end now, the next probe must show that in time.
            self.peers[peer as usize].answered();
            self.tx.push_back(Tx::Abort { peer, group, quiet: why.is_none(), text: text.clone() });
        }
        self.settling = Some(group);
        let settled = self.settle(group);
        self.settling = None;
        self.settled.clear();
        if let Err(waited) = settled {
            let late = self.late(group);
            self.break_down(format!(
                "{late} did not settle the withdrawn group's transfers in {} s",
                waited.as_secs()
            ));
            self.forget_all(group);
        }
    }

    /// Drops everything of the group that no peer and no NIC works on.
    fn forget_unsent(&mut self, group: u64) {
        self.starved.retain(|r| self.recvs.get(*r).is_some_and(|op| op.id.key.group != group));
        let sends: Vec<(Handle, bool)> = self
            .sends
            .iter()
            .filter(|(_, s)| s.id.key.group == group && !s.dead)
            .map(|(h, s)| (h, s.flying > 0))
            .collect();
        for (send, flying) in sends {
            if let Some(op) = self.sends.get_mut(send) {
                op.dead = true;
                self.sending.remove(&op.id);
            }
            if !flying {
                self.sends.remove(send);
            }
        }
        self.drop_outs(group, None);
        let recvs: Vec<Handle> =
            self.recvs.iter().filter(|(_, r)| r.id.key.group == group).map(|(h, _)| h).collect();
        for recv in recvs {
            if let Some(op) = self.recvs.remove(recv) {
                self.receiving.remove(&op.id);
            }
        }
        let grants: Vec<(Handle, bool)> = self
            .grants
            .iter()
            .filter(|(_, g)| g.group == group)
            .map(|(h, g)| (h, g.sent || g.posted > 0))
            .collect();
        for (handle, out) in grants {
            if let Some(g) = self.grants.get_mut(handle) {
                g.dead = true;
                // Tagged receives not posted yet are never filled.
                if g.grant.tagged {
                    g.left = g.left.saturating_sub(g.grant.pieces() - g.posted);
                }
            }
            if !out {
                self.finish_grant(handle);
            }
        }
        self.forget_early(group);
    }

    /// Pieces not posted yet of the group (to one peer only, where given) stay unposted.
    pub(crate) fn drop_outs(&mut self, group: u64, peer: Option<u32>) {
        let outs: Vec<Handle> = self
            .outs
            .iter()
            .filter(|(_, o)| o.group == group && peer.is_none_or(|p| p == o.peer))
            .map(|(h, _)| h)
            .collect();
        for out in outs {
            self.outs.remove(out);
        }
    }

    fn forget_early(&mut self, group: u64) {
        self.early_grants.retain(|id, _| {
            let goes = id.key.group == group;
            self.peers[id.peer as usize].kept -= usize::from(goes);
            !goes
        });
        self.large.retain(|(_, of, _), _| *of != group);
        self.peers.iter_mut().for_each(|peer| peer.forget(group));
        let mut freed = Vec::new();
        let mut buffers = Vec::new();
        self.early.retain(|id, early| {
            if id.key.group != group {
                return true;
            }
            self.peers[id.peer as usize].kept -= 1;
            if let Early::Data { bytes, permitted, .. } = early {
                buffers.push(std::mem::take(bytes));
                if !*permitted {
                    freed.push(id.peer);
                }
            }
            false
        });
        for bytes in buffers {
            self.recycle(bytes);
        }
        for peer in freed {
            self.consumed(peer);
        }
    }

    /// Polls until nothing of the group is on its way; how long that took where it took too long.
    fn settle(&mut self, group: u64) -> Result<(), Duration> {
        let start = self.rails[0].now();
        let (mut since, mut before) = (start, None);
        loop {
            self.close_settled(group);
            let now = self.rails[0].now();
            let waited = now.saturating_sub(start);
            let left = self.left_of(group);
            if left.is_none() {
                if !self.has_news(group) || waited >= NEWS {
                    return Ok(());
                }
            } else if left != before {
                (since, before) = (now, left);
            } else if now.saturating_sub(since) >= SETTLE {
                return Err(waited);
            }
            if waited >= SETTLE_MOVING {
                return Err(waited);
            }
            if !self.progress() {
                std::thread::yield_now();
            }
            if self.broken.is_some() {
                self.forget_all(group);
                return Ok(());
            }
        }
    }

    /// Whether news of the group's end is to be posted.
    fn has_news(&self, group: u64) -> bool {
        self.tx.iter().any(|t| matches!(t, Tx::Abort { group: g, .. } if *g == group) && self.is_awaited(t))
    }

    /// Whether it is worth waiting until that is posted: to those that cannot be reached it may go at any time, or never.
    pub(crate) fn is_awaited(&self, news: &Tx) -> bool {
        let Tx::Abort { peer, .. } = news else { return true };
        let peer = &self.peers[*peer as usize];
        peer.lost.is_none() || peer.wild
    }

    /// How many operations of the group are left, and how many pieces have ever moved between us and their peers: other groups'
    /// are ahead of ours. `None`: no operation is left.
    fn left_of(&self, group: u64) -> Option<(usize, u64)> {
        let sends = self.sends.iter().filter(|(_, s)| s.id.key.group == group).map(|(_, s)| s.id.peer);
        let grants = self.grants.iter().filter(|(_, g)| g.group == group).map(|(_, g)| g.peer);
        let (mut left, mut moved) = (0, 0u64);
        for peer in sends.chain(grants) {
            left += 1;
            moved += self.peers[peer as usize].pieces;
        }
        (left > 0).then_some((left, moved))
    }

    /// The peers that may still write to the group's memory.
    pub(crate) fn unsettled(&self, group: u64) -> Vec<u32> {
        let mut peers: Vec<u32> =
            self.grants.iter().filter(|(_, g)| g.group == group).map(|(_, g)| g.peer).collect();
        peers.sort_unstable();
        peers.dedup();
        peers
    }

    /// Whether the peer has settled, and nothing of what it had posted is on its way any more.
    fn has_settled(&self, group: u64, peer: u32) -> bool {
        let said: Vec<&Settled> = self.settled.iter().filter(|s| s.peer == peer).collect();
        let Some(first) = said.first() else { return false };
        // Its words are behind all of that, on connections that are read only once those before are read out or dropped: a
        // piece that has not come by then was lost (E9).
        let ordered = self.config.caps.ordered && self.config.rma;
        let is_last = ordered && (0..first.rails.max(1)).all(|rail| said.iter().any(|s| s.rail == rail));
        is_last || self.groups.arrived(group, peer) >= first.posted
    }

    /// Who has left without a word on the group settles no more. Its goodbye was the last thing on its connection; over other
    /// rails something may follow for a while.
    fn lose_those_that_left(&mut self, group: u64) {
        let all_is_here = self.config.caps.sockets && self.rails.len() == 1;
        let now = self.rails[0].now();
        for peer in self.unsettled(group) {
            let Some(since) = self.peers[peer as usize].left else { continue };
            if !self.has_settled(group, peer) && (all_is_here || now.saturating_sub(since) >= AFTERGLOW) {
                self.lose(peer, LEFT.to_owned());
            }
        }
    }

    /// Ends what is known to be over: transfers of lost peers, and of those that settled and whose pieces arrived.
    fn close_settled(&mut self, group: u64) {
        self.lose_those_that_left(group);
        let mut over: Vec<Handle> = Vec::new();
        let mut cancel: Vec<Handle> = Vec::new();
        let mut quarantine: Vec<Handle> = Vec::new();
        for (handle, g) in self.grants.iter().filter(|(_, g)| g.group == group) {
            let peer = &self.peers[g.peer as usize];
            let settled = self.has_settled(group, g.peer);
            // The one connection to a lost peer is closed. What might still be written by a NIC of its own accord, or
            // over another rail, is protected by nothing but closing, except bounce slots: they are not used again (E3).
            let lost = peer.lost.is_some();
            let closed = lost && !peer.wild && !self.config.caps.needs_local_mr && self.rails.len() == 1;
            if lost && g.bounce.is_some() {
                quarantine.push(handle);
            } else if settled || closed {
                if g.grant.tagged && g.posted > 0 && g.left > 0 {
                    cancel.push(handle);
                } else {
                    over.push(handle);
                }
            }
        }
        for handle in over {
            self.finish_grant(handle);
        }
        for handle in quarantine {
            self.grants.remove(handle);
            if let Err(error) = self.staging.quarantine(&mut self.rails) {
                return self
                    .break_down(format!("no memory in place of what lost peers may write to: {error}"));
            }
        }
        for handle in cancel {
            let Some(g) = self.grants.get(handle) else { continue };
            let rails = usize::from(g.grant.rails);
            for domain in &mut self.rails[..rails] {
                domain.cancel(Posted::Tagged(handle).ctx());
            }
        }
    }

    /// The endpoint is closed: nothing touches memory any more, so everything of the group can go.
    fn forget_all(&mut self, group: u64) {
        self.forget_unsent(group);
        let sends: Vec<Handle> =
            self.sends.iter().filter(|(_, s)| s.id.key.group == group).map(|(h, _)| h).collect();
        for send in sends {
            self.sends.remove(send);
        }
        let grants: Vec<Handle> =
            self.grants.iter().filter(|(_, g)| g.group == group).map(|(h, _)| h).collect();
        for grant in grants {
            self.grants.remove(grant);
        }
    }

    /// Labels of the peers that keep the group from settling.
    fn late(&self, group: u64) -> String {
        let sends = self.sends.iter().filter(|(_, s)| s.id.key.group == group).map(|(_, s)| s.id.peer);
        let grants = self.grants.iter().filter(|(_, g)| g.group == group).map(|(_, g)| g.peer);
        let mut peers: Vec<u32> = sends.chain(grants).collect();
        peers.sort_unstable();
        peers.dedup();
        let labels: Vec<&str> = peers.iter().map(|p| self.peers[*p as usize].label.as_str()).collect();
        labels.join(", ")
    }
}
