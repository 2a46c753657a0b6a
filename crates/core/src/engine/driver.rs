//! The state that whoever drives progress works on, one thread at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::group::{Group, Immediate, Seat, Tried, group_of};
use crate::engine::idle::{GATE_NAP, LIVENESS, LONGEST_SLEEP};
use crate::engine::op::{GroupKey, OpState};
use crate::engine::staging::Staging;
use crate::engine::summons::When;
use crate::error::{Error, Result};
use crate::process;
use crate::transport::{Bell, Ctx, Fabric, FabricFailure, NodeLocal, Patience, Transports};

pub struct Driver<T: Transports> {
    groups: Vec<Option<Group<T::Local>>>,
    /// By identity, for failures the fabric reports.
    by_id: HashMap<u64, usize>,
    /// Indices of groups with something queued or under way.
    busy: Vec<usize>,
    pub fabric: Option<T::Fabric>,
    pub staging: Staging,
    done: Vec<Ctx>,
    /// Since the last turn a group has failed, or work was completed: groups may have left `busy` behind.
    has_news: bool,
    /// Operations whose callbacks are to be run once the driver's lock is free.
    pub finished: Vec<Arc<OpState>>,
    looked: Instant,
}

/// Where to sleep, and for how long at most.
pub enum Bed {
    Bell(Arc<dyn Bell>, Duration),
    /// A device's word rings no bell.
    Nap(Duration),
    Fabric(Duration),
}

impl<T: Transports> Driver<T> {
    pub fn new(staging: usize) -> Driver<T> {
        Driver {
            groups: Vec::new(),
            by_id: HashMap::new(),
            busy: Vec::new(),
            fabric: None,
            staging: Staging::new(staging),
            done: Vec::new(),
            has_news: false,
            finished: Vec::new(),
            looked: Instant::now(),
        }
    }

    pub fn add(&mut self, seat: Seat<T::Local>) -> Result<GroupKey> {
        let index = match self.groups.iter().position(Option::is_none) {
            Some(free) => free,
            None if self.groups.len() < 1 << 16 => {
                self.groups.push(None);
                self.groups.len() - 1
            }
            None => {
                return Err(Error::Resource {
                    what: format!("process group '{}'", seat.name),
                    resource: "group slots",
                    reason: "65536 groups live in this process".to_owned(),
                    hint: "Destroy groups that are no longer used".to_owned(),
                });
            }
        };
        let key = GroupKey { index, id: seat.id };
        self.by_id.insert(key.id, index);
        self.groups[index] = Some(Group::new(index, seat));
        Ok(key)
    }

    /// Takes the group away; what was under way fails. Its memory is free afterwards. Why it had failed, if it had.
    pub fn remove(&mut self, key: GroupKey) -> Option<Error> {
        let failure = self.group(key)?.failure().cloned();
        if let Some(mut group) = self.groups[key.index].take() {
            self.by_id.remove(&group.seat.id);
            self.busy.retain(|&b| b != key.index);
            if group.is_busy() {
                let error =
                    Error::Aborted { site: group.site(), reason: "the group was destroyed".to_owned() };
                group.fail(&error, None, self.fabric.as_mut(), &mut self.staging, &mut self.finished);
            } else if group.failure().is_none() {
                group.withdraw(self.fabric.as_mut(), None);
            }
        }
        failure
    }

    #[inline]
    pub fn group(&mut self, key: GroupKey) -> Option<&mut Group<T::Local>> {
        self.groups.get_mut(key.index)?.as_mut().filter(|group| group.seat.id == key.id)
    }

    pub fn group_count(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_idle(&self) -> bool {
        self.busy.is_empty()
    }

    /// When the progress thread is to look at what is under way, if anything is.
    pub(crate) fn left(&self) -> Option<When> {
        let wants = |&&index: &&usize| self.groups[index].as_ref().is_some_and(Group::wants_thread);
        match self.busy.iter().find(wants) {
            Some(_) => Some(When::Now),
            None if self.busy.is_empty() => None,
            None => Some(When::Later),
        }
    }

    /// Fails all groups on every rank.
    pub fn give_up(&mut self, error: &Error) {
        (0..self.groups.len()).for_each(|index| self.fail(index, error, None));
    }

    /// Fails the group on every rank.
    pub fn abort(&mut self, key: GroupKey, error: &Error) {
        if self.group(key).is_some() {
            self.fail(key.index, error, None);
        }
    }

    /// `of` is the operation whose error it is, where that is known.
    fn fail(&mut self, index: usize, error: &Error, of: Option<&Arc<OpState>>) {
        process::note_failure();
        if let Some(group) = self.groups.get_mut(index).and_then(Option::as_mut) {
            self.has_news = true;
            group.fail(error, of, self.fabric.as_mut(), &mut self.staging, &mut self.finished);
        }
    }

    /// Takes an operation up.
    pub fn start(&mut self, op: Arc<OpState>) {
        let GroupKey { index, id } = op.group;
        let Some(group) = self.groups.get_mut(index).and_then(Option::as_mut).filter(|g| g.seat.id == id)
        else {
            let error = Error::Aborted { site: op.site(), reason: "the group was destroyed".to_owned() };
            if op.finish(Err(error)) {
                self.finished.push(op);
            }
            return;
        };
        let result = group.start(Arc::clone(&op), self.fabric.as_mut(), &mut self.finished);
        if group.is_busy() && !self.busy.contains(&index) {
            self.busy.push(index);
        }
        if let Err(error) = result {
            self.fail(index, &error, Some(&op));
        }
    }

    /// Runs a call of the group on the spot if nothing comes before it.
    #[inline]
    pub fn run_now(&mut self, key: GroupKey, call: &Immediate<'_>, patience: &mut Patience<'_>) -> Tried {
        let index = key.index;
        let Some(group) = self.group(key) else { return Tried::NotNow };
        let (tried, result) = group.run_now(call, patience);
        if matches!(tried, Tried::Later(_)) && !self.busy.contains(&index) {
            self.busy.push(index);
        }
        if let Err(error) = result {
            self.fail(index, &error, None);
        }
        tried
    }

    /// Starts what can start, polls everything once, and goes on with what that completed. True when anything moved, or a group failed.
    pub fn turn(&mut self) -> bool {
        let mut moved = self.advance();
        let mut spans_nodes = false;
        for at in 0..self.busy.len() {
            let index = self.busy[at];
            let Some(group) = self.groups[index].as_mut() else { continue };
            spans_nodes |= group.seat.shape.node_count() > 1;
            let result = group.seat.local.poll(&mut self.done);
            moved |= self.after_poll(index, result);
        }
        if spans_nodes {
            moved |= self.poll_fabric();
        }
        moved |= self.advance();
        moved |= std::mem::take(&mut self.has_news);
        if moved {
            self.busy.retain(|&i| self.groups[i].as_ref().is_some_and(Group::is_busy));
        }
        moved
    }

    /// Polls one group, which may have no work, for its peers' news.
    pub fn look_at(&mut self, key: GroupKey) {
        let mut done = std::mem::take(&mut self.done);
        let Some(group) = self.group(key) else { return };
        let spans_nodes = group.seat.shape.node_count() > 1;
        let result = match group.failure() {
            None => group.seat.local.poll(&mut done),
            Some(_) => Ok(false),
        };
        self.done = done;
        self.after_poll(key.index, result);
        if spans_nodes {
            self.poll_fabric();
            // Nothing of the group is posted there that would have failed by it.
            if let Some(error) = self.fabric.as_mut().and_then(|fabric| fabric.aborted(key.id)) {
                self.fail(key.index, &error, None);
            }
        }
    }

    /// Goes on with every group that can.
    fn advance(&mut self) -> bool {
        let mut moved = false;
        for at in 0..self.busy.len() {
            let index = self.busy[at];
            let Some(group) = self.groups[index].as_mut() else { continue };
            if !group.can_advance() {
                continue;
            }
            match group.advance(self.fabric.as_mut(), &mut self.staging, &mut self.finished) {
                Ok(m) => moved |= m,
                Err(error) => self.fail(index, &error, None),
            }
        }
        moved
    }

    /// Distributes completions; a failed poll fails its group.
    fn after_poll(&mut self, index: usize, result: Result<bool>) -> bool {
        let mut moved = matches!(result, Ok(true));
        let mut failed = result.err().map(|e| (index, e));
        for at in 0..self.done.len() {
            let ctx = self.done[at];
            (moved, self.has_news) = (true, true);
            let owner = group_of(ctx);
            let outcome = match self.groups.get_mut(owner).and_then(Option::as_mut) {
                Some(group) => group.complete(ctx, &mut self.finished),
                None => Ok(()),
            };
            if let Err(error) = outcome {
                failed.get_or_insert((owner, error));
            }
        }
        self.done.clear();
        if let Some((owner, error)) = failed {
            self.fail(owner, &error, None);
        }
        moved
    }

    /// Takes in what peers have sent a process that has no work: the end of a group, say.
    pub fn listen(&mut self) {
        // A few, so that callers get the seat in between.
        for _ in 0..16 {
            if !self.poll_fabric() {
                return;
            }
        }
    }

    fn poll_fabric(&mut self) -> bool {
        let Some(fabric) = self.fabric.as_mut() else { return false };
        let result = fabric.poll(&mut self.done);
        let moved = self.after_poll(usize::MAX, Ok(matches!(result, Ok(true))));
        if let Err(failure) = result {
            self.fabric_failed(&failure);
            return true;
        }
        moved
    }

    fn fabric_failed(&mut self, failure: &FabricFailure) {
        match failure.group {
            Some(id) => match self.by_id.get(&id) {
                Some(&index) => self.fail(index, &failure.error, None),
                None => tracing::debug!(error = %failure.error, "failure of a group that is gone"),
            },
            None => {
                for index in 0..self.groups.len() {
                    if self.groups[index].as_ref().is_some_and(|g| g.seat.shape.node_count() > 1) {
                        self.fail(index, &failure.error, None);
                    }
                }
            }
        }
    }

    /// Fails what has waited past its time limit, and groups whose work waits for members that are gone.
    pub fn look_around(&mut self) {
        let now = Instant::now();
        let liveness = now.duration_since(self.looked) > LIVENESS;
        for at in 0..self.busy.len() {
            let index = self.busy[at];
            let Some(group) = self.groups[index].as_mut() else { continue };
            let lost = if liveness { group.lost_peer(self.fabric.as_mut()) } else { None };
            let (error, of) = match (lost, group.overdue(now)) {
                (Some(error), _) => (error, None),
                (None, Some(op)) => (op.timeout_error(group.missing(self.fabric.as_ref())), Some(op)),
                (None, None) => continue,
            };
            self.fail(index, &error, of.as_ref());
        }
        if liveness {
            self.looked = now;
            self.listen();
        }
    }

    /// Announces the sleep to the node's peers and says where to sleep; `None` when there is nothing to wait for.
    /// `nap` is the limit where a bell alone does not bring all news.
    pub fn lie_down(&mut self, nap: Duration) -> Option<Bed> {
        let many = self.busy.len() > 1;
        let (mut on_fabric, mut gated) = (false, false);
        let mut bell = None;
        for at in 0..self.busy.len() {
            let Some(group) = self.groups[self.busy[at]].as_mut() else { continue };
            gated |= group.is_gated();
            on_fabric |= group.waits_for_fabric() && group.seat.shape.node_count() > 1;
            group.seat.local.arm();
            bell.get_or_insert_with(|| group.seat.local.bell());
        }
        match bell {
            Some(_) if gated => Some(Bed::Nap(GATE_NAP)),
            Some(_) if on_fabric && self.fabric.is_some() => Some(Bed::Fabric(nap)),
            Some(bell) => Some(Bed::Bell(bell, if many { nap } else { LONGEST_SLEEP })),
            None => None,
        }
    }

    /// Takes the announcements back, of groups that have ended their work meanwhile as well: peers would ring for nothing.
    pub fn rise(&mut self) {
        self.groups.iter_mut().flatten().for_each(|group| group.seat.local.disarm());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{Call, Collective};
    use crate::dtype::DType;
    use crate::engine::execution::Route;
    use crate::engine::op::{BRIEF, PointToPoint, Work};
    use crate::memory::Region;
    use crate::testing::{MemoryNode, MemoryTransports};
    use crate::topology::GroupShape;
    use crate::transport::MsgKey;

    const GROUP: GroupKey = GroupKey { index: 0, id: 7 };

    /// The rank of the other node is never heard of.
    fn driver(shape: &GroupShape) -> Driver<MemoryTransports> {
        let mut driver = Driver::new(0);
        let mut nodes = MemoryNode::new(shape.ranks_on(0).len(), 1);
        let seat = Seat {
            id: 7,
            name: "test".into(),
            rank: 0,
            shape: Arc::new(shape.clone()),
            local: nodes.remove(0),
            routes: (0..shape.size()).map(|rank| Route::Local(rank as u32)).collect(),
        };
        driver.add(seat).unwrap();
        driver
    }

    fn receive(memory: &mut [u8], number: u64) -> Arc<OpState> {
        let call = Call::new(Collective::SendRecv, DType::U8, memory.len() as u64);
        let key = MsgKey { group: 7, seq: MsgKey::P2P | number, tag: 0 };
        // SAFETY: nothing comes.
        let region = unsafe { Region::of(memory) };
        let work = Work::Message(PointToPoint { peer: 1, key, region, send: false });
        Arc::new(OpState::new(call, work, GROUP, "test".into(), 0, Duration::from_secs(9)))
    }

    #[test]
    fn brief_work_of_one_node_is_left_for_later() {
        let mut memory = vec![0u8; BRIEF];
        let mut driver = driver(&GroupShape::even(1, 2));
        assert_eq!(driver.left(), None);
        driver.start(receive(&mut memory, 0));
        assert_eq!(driver.left(), Some(When::Later));
        // Together they are not.
        driver.start(receive(&mut memory[..1], 1));
        assert_eq!(driver.left(), Some(When::Now));
        driver.fail(0, &Error::Internal("test".to_owned()), None);
        driver.turn();
        assert_eq!(driver.left(), None);
    }

    /// Other nodes may wait for this one's answers in the midst of a brief call.
    #[test]
    fn work_of_several_nodes_is_not() {
        let mut driver = driver(&GroupShape::even(2, 2));
        driver.start(receive(&mut [0u8; 4], 0));
        assert_eq!(driver.left(), Some(When::Now));
    }

    #[test]
    fn a_message_too_many_fails_the_group() {
        let mut memory = [0u8; 1];
        let mut driver = driver(&GroupShape::even(1, 2));
        (0..1 << 15).for_each(|number| driver.start(receive(&mut memory, number)));
        let failure = |driver: &mut Driver<MemoryTransports>| driver.group(GROUP).unwrap().failure().cloned();
        assert_eq!(failure(&mut driver), None);
        let refused = receive(&mut memory, 1 << 15);
        driver.start(Arc::clone(&refused));
        let error = refused.result().unwrap().clone().unwrap_err();
        assert!(matches!(error, Error::Resource { .. }), "{error}");
        // The peer would take the next message for this one.
        assert_eq!(failure(&mut driver), Some(error));
    }

    /// Who closed a group may still have a call of it at hand when its place is another's.
    #[test]
    fn what_is_meant_for_a_group_that_is_gone_does_not_reach_the_next() {
        let mut driver = driver(&GroupShape::even(1, 2));
        let late = GroupKey { id: 8, ..GROUP };
        driver.abort(late, &Error::Internal("test".to_owned()));
        driver.remove(late);
        let group = driver.group(GROUP).unwrap();
        assert!(group.failure().is_none());
        let mut memory = [0u8; 1];
        let call = Call::new(Collective::SendRecv, DType::U8, 1);
        let key = MsgKey { group: 8, seq: MsgKey::P2P, tag: 0 };
        // SAFETY: nothing comes.
        let region = unsafe { Region::of(&mut memory) };
        let work = Work::Message(PointToPoint { peer: 1, key, region, send: false });
        let op = Arc::new(OpState::new(call, work, late, "gone".into(), 0, Duration::from_secs(9)));
        driver.start(Arc::clone(&op));
        assert!(matches!(op.result(), Some(Err(Error::Aborted { .. }))));
        assert!(driver.is_idle());
    }
}
