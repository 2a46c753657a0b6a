//! [`ShmNode`]: the pieces of this crate behind core's [`NodeLocal`].

use std::sync::Arc;
use std::time::Duration;

use smddp_core::call::PackedCall;
use smddp_core::error::Site;
use smddp_core::shared::Shared;
use smddp_core::transport::{Bell, Ctx, Gone, Message, MsgKey, NodeLocal, Patience, PhaseRun};
use smddp_core::{Error, Result};

use crate::door::{self, Why};
use crate::doorbell::{self, Sleeper};
use crate::exchange::{Step, mismatch};
use crate::geometry::{Agreed, Geometry};
use crate::layout::Memory;
use crate::membership::Membership;
use crate::messages::Messages;
use crate::peers::Peers;
use crate::pen::Pen;
use crate::phases::{Phases, TakenUp};
use crate::reach::Reach;
use crate::ring::Ring;
use crate::script::SoFar;
use crate::segment::Segment;
use crate::single_copy::SingleCopy;
use crate::straight::Copier;
use crate::{abort, log};

/// Bytes of an exchange that is over before a sleeper would have woken.
const BRIEF: usize = 8 << 10;

/// How often a rank that gives up looks whether a peer has stopped writing into its memory, a millisecond apart. A write takes
/// far less; only a peer that something stopped between announcing and doing it is not told from one that will go on.
const LOOKS_AT_DOOR: u32 = 1000;

/// One rank's end of its group's shared memory on this node.
pub struct ShmNode {
    me: usize,
    /// Group rank of each local rank.
    ranks: Vec<u32>,
    segment: Arc<Segment>,
    ring: Ring,
    phases: Phases,
    messages: Messages,
    sleeper: Sleeper,
    /// The peer without whose next exchange the last poll could do nothing at all; work that comes in ends that.
    stuck_on: Option<usize>,
    peers: Peers,
    bell: Arc<dyn Bell>,
    /// Why nothing works any more.
    failed: Option<Error>,
}

impl ShmNode {
    pub(crate) fn new(mut segment: Segment, who: &Membership, peers: Peers, agreed: Agreed) -> ShmNode {
        segment.read_in(who.far);
        let geometry = segment.layout().geometry;
        let size = who.ranks.len();
        let segment = Arc::new(segment);
        let reach = || Reach::watching(who.local_rank, &peers);
        ShmNode {
            me: who.local_rank,
            ranks: who.ranks.clone(),
            ring: Ring::new(who.local_rank, size, geometry.slots),
            phases: Phases::new(
                who.local_rank,
                who.ranks.clone(),
                geometry.slot,
                who.streams_from.unwrap_or(usize::MAX),
                SingleCopy::new(reach(), agreed.single_copy, who.single_copy),
                agreed.hands_back,
            ),
            messages: Messages::new(
                who.local_rank,
                &segment,
                Pen::new(who.streams_from.is_some()),
                agreed.hands_back,
                Copier::new(who.local_rank, reach(), agreed.single_copy.alone && who.single_copy.alone),
            ),
            bell: Arc::new(ShmBell { segment: Arc::clone(&segment), rank: who.local_rank }),
            segment,
            sleeper: Sleeper::default(),
            stuck_on: None,
            peers,
            failed: None,
        }
    }

    /// Changes what was agreed, on all ranks between the same phases: for the probe.
    pub(crate) fn hand_back(&mut self, hands_back: bool) {
        self.phases.hand_back(hands_back);
    }

    /// The slots in use, as local rank 0 chose them.
    pub fn geometry(&self) -> Geometry {
        self.segment.layout().geometry
    }

    /// Bytes copied straight between this rank's private memory and its peers' so far.
    pub fn copied_once(&self) -> u64 {
        self.phases.single_copy().bytes() + self.messages.copied_once()
    }

    /// Bytes of results that were stored past the caches so far.
    pub fn streamed(&self) -> u64 {
        self.phases.streamed()
    }

    fn check(&self) -> Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(error) => Err(error.clone()),
        }
    }

    /// As [`check`](Self::check), once it has heard of what peers say.
    #[inline]
    fn hear(&mut self) -> Result<()> {
        self.check()?;
        if abort::is_raised(&*self.segment) {
            let error = self.heard_of_abort();
            return Err(self.fail(error));
        }
        Ok(())
    }

    /// Whether the group has not failed, as far as is known here.
    #[inline]
    fn is_well(&self) -> bool {
        self.failed.is_none() && !abort::is_raised(&*self.segment)
    }

    /// Remembers why, so that nothing is touched again. Peers are told, and the door is closed, by [`abort`](NodeLocal::abort), which the
    /// engine calls before anybody has his memory back: a door that closes with no reason raised makes its rank a lost one.
    fn fail(&mut self, error: Error) -> Error {
        self.phases.clear();
        self.messages.clear();
        self.failed = Some(error.clone());
        error
    }

    /// From here on no peer writes into this rank's memory, which its callers have back (C5).
    fn close_door(&self, why: Why) {
        let segment = &*self.segment;
        door::close(segment, self.me, why);
        for look in 0.. {
            let inside = |&peer: &usize| door::is_inside(segment, self.me, peer);
            let mut inside = (0..self.ranks.len()).filter(inside).peekable();
            if inside.peek().is_none() {
                return;
            }
            let ended: Vec<usize> = self.peers.ended().collect();
            let Some(writer) = inside.find(|peer| !ended.contains(peer)) else { return };
            if look == LOOKS_AT_DOOR {
                let peer = self.ranks[writer];
                tracing::error!(peer, "was stopped while it wrote into this rank's memory, and may go on");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_gone(&self, peer: usize) -> Option<Gone> {
        // In this order: who has left, and ended then, had left before.
        let has_ended = self.peers.has_ended(peer);
        match door::is_closed(&*self.segment, peer) {
            _ if peer == self.me => None,
            // The next poll hears why the group has failed, which is what counts: whoever is lost is named there.
            _ if abort::is_raised(&*self.segment) => None,
            Some(Why::Left) => Some(Gone::Left),
            Some(Why::Failed) => Some(Gone::Failed),
            None => has_ended.then_some(Gone::Ended),
        }
    }

    fn heard_of_abort(&self) -> Error {
        let (rank, text) = abort::reason(&*self.segment);
        let who = self.ranks.get(rank).map_or_else(|| "a rank".to_owned(), |r| format!("rank {r}"));
        Error::Aborted { site: Site::unknown(), reason: format!("{who}: {text}") }
    }

    fn notify(&self) {
        doorbell::notify(&*self.segment, self.me, self.ranks.len());
    }

    fn try_poll(&mut self, done: &mut Vec<Ctx>) -> Result<bool> {
        loop {
            let mut moved = false;
            if !self.messages.is_idle() {
                moved = self.messages.poll(&self.segment, self.sleeper.is_armed(), done)?;
                if moved {
                    self.notify();
                }
            }
            let (stepped, blockers) = self.poll_phases(done)?;
            moved |= stepped;
            if let [Step::Blocked(peer), Step::Idle] = blockers
                && self.messages.is_idle()
            {
                self.stuck_on = Some(peer);
            }
            if moved || !self.sleeper.is_armed() {
                return Ok(moved);
            }
            self.compare_logs()?;
            if !self.sleeper.wait_for(&*self.segment, self.me, self.only_hope(blockers)) {
                return Ok(false);
            }
        }
    }

    /// Consumes what is ready, else publishes ahead. Also says who blocks each of the two.
    fn poll_phases(&mut self, done: &mut Vec<Ctx>) -> Result<(bool, [Step; 2])> {
        if self.phases.is_empty() {
            return Ok((false, [Step::Idle; 2]));
        }
        let mut published = Step::Idle;
        if self.ring.consumed() == self.ring.published() {
            published = self.publish();
        }
        let consumed = self.phases.consume(&self.segment, &mut self.ring, done)?;
        if consumed == Step::Moved {
            self.notify();
        } else if published == Step::Idle {
            published = self.publish();
        }
        Ok((consumed == Step::Moved || published == Step::Moved, [consumed, published]))
    }

    /// Runs a phase that was taken up, as far as `patience` goes. How far that is; `None`: it is over.
    fn exchange_now(
        &mut self,
        run: &PhaseRun,
        up: TakenUp,
        patience: &mut Patience<'_>,
    ) -> Result<Option<SoFar>> {
        let ShmNode { me, ranks, segment, ring, phases, .. } = self;
        let notify = || doorbell::notify(&**segment, *me, ranks.len());
        let mut playing = phases.play(run, up, segment);
        if !playing.publish(ring) {
            return Ok(Some(playing.so_far));
        }
        // Where nobody is waited for, sleepers are looked for once, behind both steps; unless the second takes long.
        let mut told = playing.bytes() > BRIEF;
        if told {
            notify();
        }
        let given_up = loop {
            let Some(peer) = playing.take(ring)? else { break None };
            if !told {
                notify();
                told = true;
            }
            if !look_for(peer, patience, segment, ring) {
                break Some(playing.so_far);
            }
        };
        // Whoever reads has compared calls, and waited for others: there is nothing to find out, nor time to use.
        let alone = !playing.reads_peers();
        notify();
        if given_up.is_none() && alone {
            phases.end_at_once(up, &run.call, segment, ring)?;
        }
        Ok(given_up)
    }

    /// Lets peers know which phase this rank is in.
    fn note(&self, number: u64, call: &PackedCall) {
        if self.ranks.len() > 1 {
            log::record(&*self.segment, self.me, number, call);
        }
    }

    fn publish(&mut self) -> Step {
        let step = self.phases.publish(&self.segment, &mut self.ring);
        if step == Step::Moved {
            self.notify();
        }
        step
    }

    /// Whether nothing has changed since a poll that could do nothing. The price of most polls of a waiting rank.
    #[inline]
    fn is_stuck(&mut self) -> bool {
        match self.stuck_on {
            Some(peer) if !self.sleeper.is_armed() && !self.ring.has_published(&*self.segment, peer) => true,
            _ => {
                self.stuck_on = None;
                false
            }
        }
    }

    /// The only peer whose doings can move this rank, if there is such a one.
    fn only_hope(&self, blockers: [Step; 2]) -> Option<usize> {
        if !self.messages.is_idle() {
            return None;
        }
        match blockers {
            [Step::Blocked(a), Step::Blocked(b)] => (a == b).then_some(a),
            [Step::Blocked(one), _] | [_, Step::Blocked(one)] => Some(one),
            _ => None,
        }
    }

    /// Before sleeping: whether a peer submitted another call in place of the phase this rank waits in. Slots tell most
    /// disagreements; this finds those in which nobody publishes what another waits for: it is in another phase, as its log tells,
    /// or in a call of messages alone, of which one may lie here.
    fn compare_logs(&self) -> Result<()> {
        let Some((number, ours)) = self.phases.oldest() else { return Ok(()) };
        let mut peers = (0..self.ranks.len()).filter(|&peer| peer != self.me);
        peers.try_for_each(|peer| {
            self.phases.compare_log(number, &ours.call, peer, &self.segment)?;
            match self.messages.next_of_call(peer, ours.seq, &self.segment) {
                Some(theirs) if theirs != ours.call => Err(mismatch(&ours.call, self.ranks[peer], &theirs)),
                _ => Ok(()),
            }
        })
    }
}

/// Whether `peer` publishes the next exchange while `patience` lasts.
fn look_for(peer: usize, patience: &mut Patience<'_>, segment: &Segment, ring: &Ring) -> bool {
    while !ring.has_published(segment, peer) {
        if abort::is_raised(segment) || !patience.wait() {
            return false;
        }
    }
    true
}

impl NodeLocal for ShmNode {
    fn describe(&self) -> String {
        let Geometry { slot, slots } = self.geometry();
        format!("shared memory ({slots} slots of {} KiB)", slot >> 10)
    }

    fn submit(&mut self, run: PhaseRun) -> Result<()> {
        self.check()?;
        self.stuck_on = None;
        let call = run.call;
        let number = self.phases.submit(run)?;
        self.note(number, &call);
        Ok(())
    }

    fn run_now(&mut self, run: &PhaseRun, patience: &mut Patience<'_>) -> Result<bool> {
        // Not only once it waits: all that such a call needs of its peers may lie here, who have given it up.
        self.hear()?;
        let up = if self.messages.is_idle() { self.phases.take_up(run)? } else { None };
        let Some(up) = up else {
            self.submit(run.clone())?;
            return Ok(false);
        };
        self.stuck_on = None;
        self.note(up.number, &run.call);
        match self.exchange_now(run, up, patience) {
            Ok(None) => Ok(true),
            Ok(Some(so_far)) => {
                self.phases.keep(run.clone(), up, so_far);
                Ok(false)
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    fn enter_shared(&mut self, shared: Shared) -> Result<()> {
        self.check()?;
        if shared.parts.len() != self.ranks.len() || shared.own != self.me {
            return Err(Error::Internal(format!("{} parts of shared memory", shared.parts.len())));
        }
        self.phases.entered().enter(shared);
        Ok(())
    }

    fn leave_shared(&mut self, number: u64) {
        self.phases.entered().leave(number);
    }

    fn send(&mut self, message: Message) -> Result<()> {
        self.check()?;
        self.stuck_on = None;
        self.messages.send(message)
    }

    fn send_now(&mut self, message: &Message) -> bool {
        let sent = self.is_well() && self.messages.send_now(message, &self.segment);
        if sent {
            self.notify();
        }
        sent
    }

    fn recv_now(&mut self, message: &Message, patience: &mut Patience<'_>) -> bool {
        while self.is_well() {
            match self.messages.recv_now(message, &self.segment) {
                Some(true) => {
                    self.notify();
                    return true;
                }
                Some(false) => return false,
                None if patience.wait() => {}
                None => return false,
            }
        }
        false
    }

    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool {
        self.stuck_on = None;
        self.messages.has_come(peer, key)
    }

    fn recv(&mut self, message: Message) -> Result<()> {
        self.check()?;
        self.stuck_on = None;
        self.messages.recv(message, &self.segment)
    }

    fn poll(&mut self, done: &mut Vec<Ctx>) -> Result<bool> {
        self.hear()?;
        if self.is_stuck() {
            return Ok(false);
        }
        match self.try_poll(done) {
            Ok(moved) => Ok(moved),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn arm(&mut self) {
        self.sleeper.arm(&*self.segment, self.me);
    }

    fn disarm(&mut self) {
        self.sleeper.disarm(&*self.segment, self.me);
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::clone(&self.bell)
    }

    fn waiting_for(&self) -> Vec<usize> {
        let mut peers = self.phases.waiting_for(&self.segment, &self.ring);
        peers.extend(self.messages.waiting_for(&self.segment));
        peers.sort_unstable();
        peers.dedup();
        peers
    }

    /// Only ranks that this one waits for: what a rank published before its end still counts, so one that finished its
    /// work and left is not lost.
    fn lost_peer(&mut self) -> Option<(usize, Gone)> {
        let gone = |peer| Some((peer, self.is_gone(peer)?));
        let gone: Vec<(usize, Gone)> = (0..self.ranks.len()).filter_map(gone).collect();
        if gone.is_empty() {
            return None;
        }
        // Behind that look: what a rank published before its end is seen after its end is.
        let waited_for = self.waiting_for();
        gone.into_iter().find(|(peer, _)| waited_for.contains(peer))
    }

    fn gone(&mut self, peer: usize) -> Option<Gone> {
        let gone = self.is_gone(peer)?;
        // Behind that look, as above.
        (!self.messages.lie_ready(peer, &self.segment)).then_some(gone)
    }

    fn ended_peer(&mut self) -> Option<usize> {
        self.peers.ended().next()
    }

    fn abort(&mut self, why: &Error) {
        abort::raise(&*self.segment, self.me, &why.to_string());
        doorbell::ring_all(&*self.segment, self.me, self.ranks.len());
        self.close_door(Why::Failed);
        self.fail(why.clone());
    }
}

impl Drop for ShmNode {
    fn drop(&mut self) {
        self.disarm();
        if door::is_closed(&*self.segment, self.me).is_none() {
            self.close_door(if self.failed.is_some() { Why::Failed } else { Why::Left });
        }
    }
}

/// The futex word of one rank; keeps the segment mapped.
struct ShmBell {
    segment: Arc<Segment>,
    rank: usize,
}

impl Bell for ShmBell {
    fn value(&self) -> u32 {
        self.segment.control(self.rank).bell.futex.value()
    }

    fn wait(&self, value: u32, limit: Duration) {
        self.segment.control(self.rank).bell.futex.wait(value, limit);
    }

    fn ring(&self) {
        self.segment.control(self.rank).bell.futex.ring();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use smddp_core::Region;
    use smddp_core::order::Order;

    use crate::geometry::SingleCopies;
    use crate::probe::open;

    fn pair() -> [ShmNode; 2] {
        let agreed = Agreed { single_copy: SingleCopies::ALL, ..Agreed::default() };
        let (mut ours, mut theirs) =
            open(&[(Geometry { slot: 4096, slots: 2 }, agreed)], Order::Straight).unwrap();
        [ours.remove(0), theirs.remove(0)]
    }

    #[test]
    fn a_rank_that_gives_up_waits_for_whoever_writes_into_its_memory() {
        let [first, mut second] = pair();
        assert!(door::enter(&*first.segment, 1, 0));
        let given_up = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                second.abort(&Error::Internal("enough".to_owned()));
                given_up.store(true, Ordering::Release);
            });
            std::thread::sleep(Duration::from_millis(50));
            assert!(!given_up.load(Ordering::Acquire), "it did not wait");
            door::leave(&*first.segment, 1, 0);
        });
        assert!(!door::enter(&*first.segment, 1, 0), "its door is closed");
        assert!(door::enter(&*first.segment, 0, 1), "the other's is open");
        door::leave(&*first.segment, 0, 1);
    }

    fn message(peer: u32, ctx: u64, memory: &mut [u8]) -> Message {
        let key = MsgKey { group: 0, seq: ctx, tag: 0 };
        let call = <PackedCall as bytemuck::Zeroable>::zeroed();
        // SAFETY: the tests' memory outlives their nodes.
        let region = unsafe { Region::of(memory) };
        Message { key, peer, peer_rank: peer, region, call, ctx: Ctx(ctx) }
    }

    #[test]
    fn who_leaves_is_lost_to_those_alone_who_wait_for_more() {
        let mut memory = [[1u8; 4], [0; 4], [0; 4]];
        let [sent, first, second] = &mut memory;
        let [mut reader, mut leaver] = pair();
        leaver.send(message(0, 1, sent)).unwrap();
        leaver.poll(&mut vec![]).unwrap();
        reader.recv(message(1, 1, first)).unwrap();
        assert_eq!((reader.lost_peer(), reader.gone(1)), (None, None));
        drop(leaver);
        // What it sent lies here; nothing more will come.
        assert_eq!((reader.lost_peer(), reader.gone(1)), (None, None));
        let mut done = vec![];
        reader.poll(&mut done).unwrap();
        assert_eq!(done, [Ctx(1)]);
        assert_eq!((reader.lost_peer(), reader.gone(1)), (None, Some(Gone::Left)));
        reader.recv(message(1, 2, second)).unwrap();
        assert_eq!(reader.lost_peer(), Some((1, Gone::Left)));
    }

    #[test]
    fn who_failed_before_has_not_left() {
        let [mut first, mut second] = pair();
        second.abort(&Error::Internal("enough".to_owned()));
        drop(second);
        assert_eq!(first.gone(1), None, "why, the next poll says");
        assert!(matches!(first.poll(&mut vec![]), Err(Error::Aborted { .. })));
    }

    /// A rank that has lost another ends its group; who waits for it hears whom it has lost, whatever it looks at first.
    #[test]
    fn who_failed_because_of_another_is_not_lost_itself() {
        let [mut first, mut second] = pair();
        let mut memory = [0u8; 8];
        first.recv(message(1, 1, &mut memory)).unwrap();
        assert_eq!((first.waiting_for(), first.lost_peer()), (vec![1], None));
        second.abort(&Error::Internal("it has lost rank 7".to_owned()));
        assert_eq!(first.lost_peer(), None);
        let error = first.poll(&mut vec![]).unwrap_err();
        assert!(error.to_string().contains("rank 7"), "{error}");
    }

    /// Until it has said why, nobody takes it for lost: its record is raised before its door closes.
    #[test]
    fn who_has_just_failed_is_not_lost() {
        let [mut first, mut second] = pair();
        let mut memory = [[0u8; 8]; 3];
        let [sent, wanted, waits] = &mut memory;
        first.send(message(1, 1, sent)).unwrap();
        first.poll(&mut vec![]).unwrap();
        first.recv(message(1, 1, waits)).unwrap();
        second.recv(message(0, 1, &mut wanted[..4])).unwrap();
        let error = second.poll(&mut vec![]).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert_eq!((first.waiting_for(), first.lost_peer()), (vec![1], None));
        second.abort(&error);
        assert_eq!(first.lost_peer(), None);
        let heard = first.poll(&mut vec![]).unwrap_err();
        assert!(heard.to_string().contains("ranks disagree"), "{heard}");
    }

    /// One that heard of it, say, and left: why the group has failed is what counts.
    #[test]
    fn who_leaves_a_group_that_has_failed_is_not_lost() {
        let [mut first, second] = pair();
        let mut memory = [0u8; 8];
        first.recv(message(1, 1, &mut memory)).unwrap();
        abort::raise(&*first.segment, 0, "enough");
        drop(second);
        assert_eq!((first.lost_peer(), first.gone(1)), (None, None));
    }

    #[test]
    fn who_fails_and_is_dropped_closes_its_door() {
        let [mut first, mut second] = pair();
        let mut memory = [[0u8; 8]; 2];
        let [sent, wanted] = &mut memory;
        first.send(message(1, 1, sent)).unwrap();
        second.recv(message(0, 1, &mut wanted[..4])).unwrap();
        first.poll(&mut vec![]).unwrap();
        second.poll(&mut vec![]).unwrap_err();
        drop(second);
        assert_eq!(door::is_closed(&*first.segment, 1), Some(Why::Failed));
    }

    /// One that says nothing of it, not yet or never, is.
    #[test]
    fn who_failed_without_a_word_is_lost() {
        let [mut first, second] = pair();
        let mut memory = [0u8; 8];
        first.recv(message(1, 1, &mut memory)).unwrap();
        second.close_door(Why::Failed);
        assert_eq!(first.lost_peer(), Some((1, Gone::Failed)));
    }

    #[test]
    fn who_stays_inside_is_not_waited_for_without_end() {
        let [first, mut second] = pair();
        assert!(door::enter(&*first.segment, 1, 0));
        second.abort(&Error::Internal("enough".to_owned()));
        assert!(door::is_inside(&*first.segment, 1, 0));
    }
}
