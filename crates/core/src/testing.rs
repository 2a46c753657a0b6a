//! Transports in plain memory, for tests: several ranks in one process, as threads or stepped by one thread.
//!
//! Phases run when the last rank of a node has submitted its own; messages are copied when both sides are posted, in
//! an order drawn from a seed, so that nothing can rely on it. Every call is compared as the real transports do.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::call::PackedCall;
use crate::error::{Error, Result, Site};
use crate::memory::{Owner, Region};
use crate::plan::{Op, Who};
use crate::reduce;
use crate::transport::{
    Bell, Ctx, Fabric, FabricFailure, Message, MsgKey, NodeLocal, Patience, PhaseRun, Transports,
};

/// The two transports of this module.
pub struct MemoryTransports;

impl Transports for MemoryTransports {
    type Local = MemoryNode;
    type Fabric = MemoryFabric;
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bell on a condition variable.
#[derive(Default)]
struct MemoryBell {
    value: Mutex<u32>,
    rung: Condvar,
}

impl Bell for MemoryBell {
    fn value(&self) -> u32 {
        *lock(&self.value)
    }

    fn wait(&self, value: u32, limit: Duration) {
        let guard = lock(&self.value);
        // Woken or not, the caller polls again.
        drop(self.rung.wait_timeout_while(guard, limit, |v| *v == value));
    }

    fn ring(&self) {
        *lock(&self.value) += 1;
        self.rung.notify_all();
    }
}

/// Posted messages of a set of ranks; matched by (from, to, key).
#[derive(Default)]
struct Board {
    sends: Vec<(u32, u32, Message)>,
    recvs: Vec<(u32, u32, Message)>,
    /// Per rank.
    done: Vec<Vec<Ctx>>,
    seed: u64,
    /// Bytes by (from, to).
    moved: Vec<(u32, u32, u64)>,
}

fn mismatch(site: Site, ours: PackedCall, peer: u32, theirs: PackedCall) -> Error {
    Error::Mismatch { site, ours: ours.to_string(), peer: peer as usize, theirs: theirs.to_string() }
}

impl Board {
    fn new(ranks: usize, seed: u64) -> Board {
        Board { done: vec![Vec::new(); ranks], seed, ..Board::default() }
    }

    fn has_come(&self, from: u32, to: u32, key: &MsgKey) -> bool {
        self.sends.iter().any(|s| s.0 == from && s.1 == to && s.2.key == *key)
    }

    /// Moves at most one matching pair, chosen by the seed.
    fn step(&mut self) -> Result<bool> {
        let pairs: Vec<(usize, usize)> = self
            .sends
            .iter()
            .enumerate()
            .filter_map(|(s, (from, to, m))| {
                let fits = |r: &(u32, u32, Message)| r.0 == *from && r.1 == *to && r.2.key == m.key;
                Some((s, self.recvs.iter().position(fits)?))
            })
            .collect();
        if pairs.is_empty() {
            return Ok(false);
        }
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (s, r) = pairs[(self.seed >> 33) as usize % pairs.len()];
        let (from, to, send) = self.sends.swap_remove(s);
        let (_, _, recv) = self.recvs.swap_remove(r);
        if send.call != recv.call || send.region.len() != recv.region.len() {
            return Err(mismatch(
                Site::of_call(recv.call, recv.key.number()),
                recv.call,
                recv.peer_rank,
                send.call,
            ));
        }
        self.carry(from, to, &send, recv.region);
        self.done[to as usize].push(recv.ctx);
        Ok(true)
    }

    /// Gives `to` what was sent for `wanted`, if it was.
    fn take(&mut self, to: u32, wanted: &Message) -> bool {
        let fits = |s: &(u32, u32, Message)| {
            let same = s.2.key == wanted.key && s.2.call == wanted.call;
            s.0 == wanted.peer && s.1 == to && same && s.2.region.len() == wanted.region.len()
        };
        let Some(at) = self.sends.iter().position(fits) else { return false };
        let (from, _, send) = self.sends.swap_remove(at);
        self.carry(from, to, &send, wanted.region);
        true
    }

    fn carry(&mut self, from: u32, to: u32, send: &Message, place: Region) {
        place.copy_from(send.region);
        self.done[from as usize].push(send.ctx);
        match self.moved.iter_mut().find(|m| m.0 == from && m.1 == to) {
            Some(m) => m.2 += send.region.len() as u64,
            None => self.moved.push((from, to, send.region.len() as u64)),
        }
    }
}

struct NodeState {
    queues: Vec<VecDeque<PhaseRun>>,
    board: Board,
    failed: Option<(usize, String)>,
}

/// One node's ranks of one group.
pub struct MemoryNode {
    rank: usize,
    state: Arc<Mutex<NodeState>>,
    bells: Arc<Vec<Arc<MemoryBell>>>,
    gone: bool,
    /// About to sleep, or asleep.
    armed: bool,
    slow_to_tell: bool,
}

impl MemoryNode {
    /// One transport a local rank.
    pub fn new(ranks: usize, seed: u64) -> Vec<MemoryNode> {
        let state = Arc::new(Mutex::new(NodeState {
            queues: vec![VecDeque::new(); ranks],
            board: Board::new(ranks, seed),
            failed: None,
        }));
        let bells = Arc::new((0..ranks).map(|_| Arc::default()).collect());
        (0..ranks)
            .map(|rank| MemoryNode {
                rank,
                state: Arc::clone(&state),
                bells: Arc::clone(&bells),
                gone: false,
                armed: false,
                slow_to_tell: false,
            })
            .collect()
    }

    /// Moves something only when asked by a rank that is about to sleep.
    #[must_use]
    pub fn slow_to_tell(mut self) -> MemoryNode {
        self.slow_to_tell = true;
        self
    }

    fn ring_all(&self) {
        self.bells.iter().for_each(|b| b.ring());
    }

    fn check_awake(&self) -> Result<()> {
        if self.armed {
            return Err(Error::Internal("work for a rank that has announced its sleep".to_owned()));
        }
        Ok(())
    }
}

impl NodeState {
    /// Runs the oldest phase when every rank has submitted it.
    fn phase(&mut self) -> Result<bool> {
        if self.queues.iter().any(VecDeque::is_empty) {
            return Ok(false);
        }
        let runs: Vec<PhaseRun> = self.queues.iter_mut().filter_map(VecDeque::pop_front).collect();
        for (peer, run) in runs.iter().enumerate() {
            if run.call != runs[0].call {
                return Err(mismatch(Site::unknown(), runs[0].call, peer as u32, run.call));
            }
        }
        let Op::Phase(moves) = &runs[0].plan.steps[runs[0].step as usize].op else {
            return Err(Error::Internal("a step that is no phase was submitted".to_owned()));
        };
        // All sources are read before any destination is written, as the moves of a phase are independent.
        let mut results = Vec::with_capacity(moves.len());
        for m in moves {
            let mut value = vec![0u8; m.src.len];
            // SAFETY: `value` outlives the combination below.
            let region = unsafe { Region::of(&mut value) };
            let at = |run: &PhaseRun| run.buffers.at(m.src, run.shift);
            match m.from {
                Who::One(l) => region.copy_from(at(&runs[l as usize])),
                Who::All => {
                    let sources: Vec<Region> = runs.iter().map(at).collect();
                    reduce::combine(runs[0].arith, m.finish, region, &sources);
                }
            }
            results.push(value);
        }
        for (m, mut value) in moves.iter().zip(results) {
            // SAFETY: `value` outlives the copies below.
            let region = unsafe { Region::of(&mut value) };
            for (l, run) in runs.iter().enumerate() {
                if m.to == Who::All || m.to == Who::One(l as u32) {
                    run.buffers.at(m.dst, run.shift).copy_from(region);
                }
            }
        }
        for (rank, run) in runs.iter().enumerate() {
            self.board.done[rank].push(run.ctx);
        }
        Ok(true)
    }
}

impl NodeLocal for MemoryNode {
    fn describe(&self) -> String {
        "plain memory".to_owned()
    }

    fn submit(&mut self, run: PhaseRun) -> Result<()> {
        self.check_awake()?;
        lock(&self.state).queues[self.rank].push_back(run);
        Ok(())
    }

    /// Over at once where this rank is the last to come.
    fn run_now(&mut self, run: &PhaseRun, _: &mut Patience<'_>) -> Result<bool> {
        let ctx = run.ctx;
        self.submit(run.clone())?;
        if self.slow_to_tell {
            return Ok(false);
        }
        lock(&self.state).phase()?;
        let done = &mut lock(&self.state).board.done[self.rank];
        let over = done.contains(&ctx);
        done.retain(|other| *other != ctx);
        self.ring_all();
        Ok(over)
    }

    fn send(&mut self, m: Message) -> Result<()> {
        self.check_awake()?;
        lock(&self.state).board.sends.push((self.rank as u32, m.peer, m));
        Ok(())
    }

    fn recv(&mut self, m: Message) -> Result<()> {
        self.check_awake()?;
        lock(&self.state).board.recvs.push((m.peer, self.rank as u32, m));
        Ok(())
    }

    /// What has come already. Nothing is sent on the spot.
    fn recv_now(&mut self, message: &Message, _: &mut Patience<'_>) -> bool {
        let came = !self.slow_to_tell && lock(&self.state).board.take(self.rank as u32, message);
        if came {
            self.ring_all();
        }
        came
    }

    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool {
        lock(&self.state).board.has_come(peer, self.rank as u32, key)
    }

    fn poll(&mut self, done: &mut Vec<Ctx>) -> Result<bool> {
        let mut state = lock(&self.state);
        if let Some((rank, why)) = &state.failed {
            let reason = format!("local rank {rank}: {why}");
            return Err(Error::Aborted { site: Site::unknown(), reason });
        }
        if self.slow_to_tell && !self.armed {
            return Ok(false);
        }
        let moved = state.phase()? | state.board.step()?;
        done.append(&mut state.board.done[self.rank]);
        drop(state);
        if moved {
            self.ring_all();
        }
        Ok(moved)
    }

    fn arm(&mut self) {
        self.armed = true;
    }

    fn disarm(&mut self) {
        self.armed = false;
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::clone(&self.bells[self.rank]) as Arc<dyn Bell>
    }

    fn waiting_for(&self) -> Vec<usize> {
        let state = lock(&self.state);
        let me = self.rank as u32;
        let mut ranks: Vec<usize> = Vec::new();
        if !state.queues[self.rank].is_empty() {
            ranks.extend((0..state.queues.len()).filter(|&l| state.queues[l].is_empty()));
        }
        ranks.extend(state.board.sends.iter().filter(|s| s.0 == me).map(|s| s.1 as usize));
        ranks.extend(state.board.recvs.iter().filter(|r| r.1 == me).map(|r| r.0 as usize));
        ranks
    }

    fn abort(&mut self, why: &Error) {
        let mut state = lock(&self.state);
        state.failed.get_or_insert_with(|| (self.rank, why.to_string()));
        // The memory of a rank that is gone must not be touched by the others' phases.
        state.queues[self.rank].clear();
        let me = self.rank as u32;
        state.board.sends.retain(|s| s.0 != me);
        state.board.recvs.retain(|r| r.1 != me);
        drop(state);
        self.gone = true;
        self.ring_all();
    }
}

/// Messages between all processes of a test.
#[derive(Clone)]
pub struct MemoryFabric {
    me: u32,
    switch: Arc<Mutex<Switch>>,
}

struct Switch {
    board: Board,
    /// Aborts on their way: (to, group, why).
    aborts: Vec<(u32, u64, String)>,
}

impl MemoryFabric {
    /// One fabric a process. Peer ids are process numbers.
    pub fn new(processes: usize, seed: u64) -> Vec<MemoryFabric> {
        let switch = Switch { board: Board::new(processes, seed), aborts: Vec::new() };
        let switch = Arc::new(Mutex::new(switch));
        (0..processes as u32).map(|me| MemoryFabric { me, switch: Arc::clone(&switch) }).collect()
    }

    /// Bytes moved by (from, to), of all processes.
    pub fn moved(&self) -> Vec<(u32, u32, u64)> {
        lock(&self.switch).board.moved.clone()
    }
}

impl Fabric for MemoryFabric {
    fn address(&self) -> Vec<u8> {
        self.me.to_le_bytes().to_vec()
    }

    fn connect(&mut self, address: &[u8], _label: &str) -> Result<u32> {
        let bytes =
            address.try_into().map_err(|_| Error::Internal("an address of another fabric".to_owned()))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn deregister(&mut self, _memory: Region) {}

    fn register(&mut self, _memory: Region, _owner: Owner) -> Result<()> {
        Ok(())
    }

    fn least_device_message(&self) -> Option<usize> {
        Some(1)
    }

    fn send(&mut self, m: Message) -> Result<()> {
        lock(&self.switch).board.sends.push((self.me, m.peer, m));
        Ok(())
    }

    fn recv(&mut self, m: Message) -> Result<()> {
        lock(&self.switch).board.recvs.push((m.peer, self.me, m));
        Ok(())
    }

    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool {
        lock(&self.switch).board.has_come(peer, self.me, key)
    }

    fn poll(&mut self, done: &mut Vec<Ctx>) -> std::result::Result<bool, FabricFailure> {
        let mut switch = lock(&self.switch);
        if let Some(at) = switch.aborts.iter().position(|a| a.0 == self.me) {
            let (_, group, reason) = switch.aborts.swap_remove(at);
            let error = Error::Aborted { site: Site::unknown(), reason };
            return Err(FabricFailure { group: Some(group), error });
        }
        let moved = switch.board.step().map_err(|error| FabricFailure { group: None, error })?;
        done.append(&mut switch.board.done[self.me as usize]);
        Ok(moved)
    }

    fn withdraw(&mut self, group: u64, peers: &[u32], why: Option<&Error>) {
        let mut switch = lock(&self.switch);
        let me = self.me;
        switch.board.sends.retain(|s| s.0 != me || s.2.key.group != group);
        switch.board.recvs.retain(|r| r.1 != me || r.2.key.group != group);
        if let Some(why) = why {
            switch.aborts.extend(peers.iter().map(|&p| (p, group, why.to_string())));
        }
    }

    fn waiting_for(&self, group: u64) -> Vec<usize> {
        let board = &lock(&self.switch).board;
        let ours = |m: &Message| (m.key.group == group).then_some(m.peer_rank as usize);
        let sends = board.sends.iter().filter(|s| s.0 == self.me).filter_map(|s| ours(&s.2));
        let recvs = board.recvs.iter().filter(|r| r.1 == self.me).filter_map(|r| ours(&r.2));
        sends.chain(recvs).collect()
    }

    fn doze(&mut self, limit: Duration) {
        std::thread::sleep(limit);
    }

    fn traffic(&self) -> Vec<(u32, u64, u64)> {
        let moved = self.moved();
        let sum = |f: u32, t: u32| moved.iter().filter(|m| m.0 == f && m.1 == t).map(|m| m.2).sum();
        let peers = lock(&self.switch).board.done.len() as u32;
        (0..peers).map(|p| (p, sum(self.me, p), sum(p, self.me))).collect()
    }

    fn describe(&self) -> String {
        "plain memory".to_owned()
    }
}
