//! The thread that watches over the lives of calls that NCCL carries (L1 and L2 in `life.rs`). A kernel of NCCL waits for its peers
//! for ever, and stops the streams behind it. So does a host that enqueues one, where NCCL connects at the first call, where a
//! launch queue is full, or where the host waits for the device.
//!
//! - **L3** a call ends when the device is past it and the group had not failed when asked after that: what releases streams early
//!   fails the group first. So a call that has not run to its end is never taken for one that has.
//! - **L4** when the group fails, every call that is announced or enqueued fails with the group's error, before NCCL's kernels are
//!   ended; later ones are refused with it.
//! - **L5** the group fails when it has failed on the host, NCCL tells an error, a process of the node has ended, or a call has
//!   passed its limit. Then the communicators are aborted: their kernels end, and hosts that are stuck in a call of NCCL's come
//!   back. That takes at most [`POLL`], what the driver is given to answer (Q1), [`NEWS`] where NCCL has failed and nobody knows
//!   why, what the communicator gives a call to come back by itself, and as long as the abort.
//! - **L6** while no call is announced or enqueued the thread sleeps, and nothing is asked of the device.
//! - **L7** the thread makes no call of the driver's, which may not come back before the very call ends that is to be given up:
//!   another asks (`ask.rs`). A call that is over when its limit passes, while the driver answers nobody, counts as one that
//!   is not.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smddp_core::communicator::Communicator;
use smddp_core::error::Site;
use smddp_core::transport::Transports;
use smddp_core::{Collective, Error, Result};

use crate::ask::{Asker, no_thread};
use crate::call::missing;
use crate::device::Device;
use crate::life::Life;
use crate::nccl::{Ending, NcclComm};

/// How often calls are looked at.
const POLL: Duration = Duration::from_millis(100);
/// How much later than the exchange on the host, which knows whom it waits for, the device's part is given up.
const GRACE: Duration = Duration::from_secs(1);
/// How long a call may still take that a process of the node has left by its end: what that has sent may be on its way.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long NCCL's own error waits for the reason, which is looked for every [`POLL`]: NCCL sees a connection close while the process
/// behind it still gives back its device's memory, and only after that it has ended.
const NEWS: Duration = Duration::from_secs(2);
/// How long the end waits for the thread.
const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    /// Announced or enqueued; and what has ended since the thread last looked.
    calls: Vec<Arc<Life>>,
    /// What the group failed with, as seen from here.
    failure: Option<Error>,
    ending: bool,
    gone: bool,
}

/// What NCCL carries a group's calls with.
pub(crate) struct Communicators {
    /// Of the node, or of all ranks.
    pub(crate) first: NcclComm,
    /// Of all ranks, of a hierarchical group some of whose calls go so.
    pub(crate) flat: Option<NcclComm>,
}

impl Communicators {
    fn each(&self) -> impl Iterator<Item = &NcclComm> {
        [&self.first].into_iter().chain(&self.flat)
    }

    /// Ends all of them at once: a call of one may lie on its stream behind one of another that hangs, and NCCL's end waits for it.
    fn end(&self, failed: bool) {
        let endings: Vec<Ending> = self.each().filter_map(|nccl| nccl.begin_end(failed)).collect();
        endings.into_iter().for_each(Ending::wait);
    }
}

struct Shared<T: Transports> {
    host: Communicator<T>,
    rail: Option<Communicator<T>>,
    nccl: Communicators,
    state: Mutex<State>,
    changed: Condvar,
}

/// A group's communicators of NCCL, and the thread that watches their calls.
pub(crate) struct Watch<T: Transports> {
    shared: Arc<Shared<T>>,
    /// The process whose thread it is.
    process: u32,
}

impl<T: Transports> Watch<T> {
    pub(crate) fn new(
        host: &Communicator<T>,
        rail: Option<&Communicator<T>>,
        nccl: Communicators,
        device: &Arc<Device>,
    ) -> Result<Watch<T>> {
        let asker = Asker::start(device, host.timeout())?;
        let (host, rail) = (host.clone(), rail.cloned());
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { host, rail, nccl, state, changed });
        let thread = Arc::clone(&shared);
        let spawned = std::thread::Builder::new()
            .name("smddp-nccl-watch".to_owned())
            .spawn(move || thread.run(asker))
            .map_err(|e| no_thread(&e.to_string()));
        // From here on dropping it ends the communicators, and the thread if there is one.
        let watch = Watch { shared, process: std::process::id() };
        if spawned.is_err() {
            watch.shared.lock().gone = true;
        }
        spawned?;
        Ok(watch)
    }

    pub(crate) fn nccl(&self) -> &Communicators {
        &self.shared.nccl
    }

    /// A call is about to be enqueued; its time, the group's when none is given, begins now.
    pub(crate) fn announce(
        &self,
        collective: Collective,
        seq: u64,
        timeout: Option<Duration>,
    ) -> Result<Arc<Life>> {
        let shared = &self.shared;
        let grace = if shared.rail.is_some() { GRACE } else { Duration::ZERO };
        let limit = timeout.unwrap_or_else(|| shared.host.timeout()).saturating_add(grace);
        let call = Arc::new(Life::begin(collective, seq, limit));
        let mut state = shared.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        if state.ending {
            return Err(missing());
        }
        state.calls.push(Arc::clone(&call));
        if state.calls.len() == 1 {
            shared.changed.notify_all();
        }
        Ok(call)
    }

    /// Fails the group, on all ranks.
    pub(crate) fn fail(&self, error: &Error) {
        self.shared.settle(error);
        self.shared.tell(error);
        self.shared.changed.notify_all();
    }

    /// What the group failed with, as seen from here.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.shared.lock().failure.clone()
    }

    /// How a call went that the device is past (L3); none: NCCL has failed, and the thread is finding out why.
    pub(crate) fn verdict(&self, call: &Life) -> Option<Result<()>> {
        if call.is_over() {
            return call.outcome();
        }
        if let Some(error) = self.shared.host_failure() {
            self.fail(&error);
            return Some(Err(call.error().unwrap_or(error)));
        }
        if self.shared.nccl_failure().is_some() {
            return None;
        }
        call.ends();
        call.outcome()
    }

    /// What a call failed with that was refused with `error`: NCCL refuses all when it has failed itself.
    pub(crate) fn refusal(&self, error: Error, call: &Life) -> Error {
        if self.shared.nccl_failure().is_some() {
            self.fail(&self.shared.explained(error.clone(), call));
        }
        call.error().unwrap_or(error)
    }

    /// Ends the thread and the communicators; where the group has failed, as `why` says, without waiting for peers.
    pub(crate) fn end(&self, why: Option<&Error>) {
        let shared = &self.shared;
        if let Some(error) = why {
            shared.settle(error);
        }
        let mut state = shared.lock();
        state.ending = true;
        shared.changed.notify_all();
        let until = Instant::now() + FAREWELL;
        while !state.gone && Instant::now() < until {
            state = shared.wait(state, Some(POLL));
        }
        drop(state);
        // While no call was open nobody looked (L6), and NCCL destroys only what is well (K5).
        if let Some(error) = shared.nccl_failure() {
            shared.settle(&error);
        }
        let has_failed = shared.lock().failure.is_some();
        shared.nccl.end(has_failed);
    }
}

impl<T: Transports> Drop for Watch<T> {
    fn drop(&mut self) {
        // In a forked child the thread does not exist, and the rest is the parent's.
        if self.process == std::process::id() && !self.shared.lock().ending {
            self.end(Some(&missing()));
        }
    }
}

impl<T: Transports> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that change it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Option<Duration>) -> MutexGuard<'a, State> {
        match limit {
            Some(limit) => self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn run(&self, asker: Asker) {
        self.watch(asker);
        self.lock().gone = true;
        self.changed.notify_all();
    }

    fn watch(&self, mut asker: Asker) {
        // When a process of the node was first seen to have ended.
        let mut seen = None;
        let mut state = self.lock();
        while !state.ending {
            if let Some(error) = state.failure.clone() {
                drop(state);
                return self.fail(&error);
            }
            if state.calls.is_empty() {
                state = self.wait(state, None);
                continue;
            }
            state = self.wait(state, Some(POLL));
            let calls = state.calls.clone();
            drop(state);
            let found = self.look(&calls, &mut asker, &mut seen);
            if let Some(error) = found {
                self.settle(&error);
            }
            state = self.lock();
            state.calls.retain(|call| !call.is_over());
        }
    }

    /// Ends those calls that have ended. Why the rest never will, if so.
    fn look(&self, calls: &[Arc<Life>], asker: &mut Asker, seen: &mut Option<Instant>) -> Option<Error> {
        let running = calls.iter().filter(|call| !call.is_over()).cloned().collect();
        let past = match asker.past(running) {
            Ok(past) => past,
            Err(error) => return Some(error),
        };
        // After the device, not before (L3).
        if let Some(error) = self.host_failure() {
            return Some(error);
        }
        let of_nccl = self.nccl_failure();
        if of_nccl.is_none() {
            past.into_iter().for_each(|call| call.ends());
        }
        let open = || calls.iter().filter(|call| !call.is_over());
        let first = open().next()?;
        if let Some(error) = of_nccl {
            return Some(self.explained(error, first));
        }
        self.lost(open(), seen).or_else(|| open().find_map(|call| self.overdue(call)))
    }

    /// What the group has failed with on the host.
    fn host_failure(&self) -> Option<Error> {
        self.host.failure().or_else(|| self.rail.as_ref()?.failure())
    }

    fn nccl_failure(&self) -> Option<Error> {
        self.nccl.each().find_map(|nccl| nccl.health().err())
    }

    /// Why NCCL has failed, with `error`, while `call` was open: mostly for a lost rank, whose name the group on the host knows.
    fn explained(&self, error: Error, call: &Life) -> Error {
        let since = Instant::now();
        loop {
            let reason = self.host_failure().or_else(|| self.host.ended_peer());
            let is_over = || since.elapsed() >= NEWS || self.lock().ending;
            if let Some(error) = reason.or_else(|| is_over().then(|| error.clone())) {
                return error.at(&self.site(call));
            }
            std::thread::sleep(POLL);
        }
    }

    /// The error for a process of the node that has ended, where a call still waits [`LAST_WORDS`] later.
    fn lost<'a>(
        &self,
        mut open: impl Iterator<Item = &'a Arc<Life>>,
        seen: &mut Option<Instant>,
    ) -> Option<Error> {
        let error = self.host.ended_peer()?;
        let ended = *seen.get_or_insert_with(Instant::now);
        let call = open.find(|call| call.since.max(ended).elapsed() >= LAST_WORDS)?;
        Some(error.at(&self.site(call)))
    }

    fn overdue(&self, call: &Life) -> Option<Error> {
        let waited = call.since.elapsed();
        let error = || Error::Timeout { site: self.site(call), waited, missing: Vec::new() };
        (waited >= call.limit).then(error)
    }

    fn site(&self, call: &Life) -> Site {
        let (rank, group) = (self.host.rank(), self.host.name().to_owned());
        Site { rank, group, op: call.collective.name().to_owned(), seq: call.seq }
    }

    /// The group has failed, unless it had before (L4).
    fn settle(&self, error: &Error) {
        let mut state = self.lock();
        let error = state.failure.get_or_insert_with(|| error.clone()).clone();
        state.calls.drain(..).for_each(|call| call.fails(&error));
    }

    fn fail(&self, error: &Error) {
        tracing::warn!(%error, group = self.host.name(), "ending NCCL's calls");
        // First what tells the other ranks and releases streams that wait for words, then the kernels.
        self.tell(error);
        self.nccl.end(true);
    }

    fn tell(&self, error: &Error) {
        let reason = error.to_string();
        if self.host.failure().is_none() {
            self.host.abort(&reason);
        }
        if let Some(rail) = self.rail.as_ref().filter(|r| r.failure().is_none()) {
            rail.abort(&reason);
        }
    }
}
