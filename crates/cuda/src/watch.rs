//! Watches the calls that NCCL's kernels carry: a kernel waits for its peers for ever, and stops the streams behind it.
//!
//! - **N3** when the group has failed on the host, NCCL tells an error, or a call has passed its time limit, the
//!   communicator is aborted: its kernels end, and the streams behind them go on. That takes at most [`POLL`], and as
//!   long as the abort.
//! - **N4** while no call is outstanding the thread sleeps, and nothing is asked of the device.
//! - **N5** the thread asks the device in relaxed capture mode, so that graphs captured elsewhere are left alone; calls
//!   that are captured are not watched, since it is their replays that run.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smddp_core::communicator::Communicator;
use smddp_core::error::Site;
use smddp_core::transport::Transports;
use smddp_core::{Collective, Error, Result};
use smddp_cuda_sys as sys;

use crate::device::Device;
use crate::nccl::NcclComm;
use crate::past::Past;

/// How often outstanding calls are looked at.
const POLL: Duration = Duration::from_millis(100);
/// How much later than the exchange on the host, which knows whom it waits for, the device's part is given up.
const GRACE: Duration = Duration::from_secs(1);
/// How long the end waits for the thread.
const FAREWELL: Duration = Duration::from_secs(5);

/// A call whose end the device has not reported yet.
struct Outstanding {
    past: Past,
    collective: Collective,
    seq: u64,
    since: Instant,
    limit: Duration,
}

#[derive(Default)]
struct State {
    calls: Vec<Outstanding>,
    made: u64,
    /// What the group failed with, as seen from here.
    failure: Option<Error>,
    ending: bool,
    gone: bool,
}

struct Shared<T: Transports> {
    host: Communicator<T>,
    rail: Option<Communicator<T>>,
    nccl: NcclComm,
    device: Arc<Device>,
    state: Mutex<State>,
    changed: Condvar,
}

/// A communicator of NCCL, and the thread that watches its calls.
pub(crate) struct Watched<T: Transports> {
    shared: Arc<Shared<T>>,
}

impl<T: Transports> Watched<T> {
    pub(crate) fn new(
        host: &Communicator<T>,
        rail: Option<&Communicator<T>>,
        nccl: NcclComm,
        device: &Arc<Device>,
    ) -> Result<Watched<T>> {
        let shared = Arc::new(Shared {
            host: host.clone(),
            rail: rail.cloned(),
            nccl,
            device: Arc::clone(device),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let watch = Arc::clone(&shared);
        std::thread::Builder::new().name("smddp-nccl-watch".to_owned()).spawn(move || watch.run()).map_err(
            |e| Error::Resource {
                what: "watching NCCL".to_owned(),
                resource: "threads",
                reason: e.to_string(),
                hint: "Raise the process limit (ulimit -u)".to_owned(),
            },
        )?;
        Ok(Watched { shared })
    }

    pub(crate) fn nccl(&self) -> &NcclComm {
        &self.shared.nccl
    }

    /// A call ends at `past` on `stream`; its time, the group's when none is given, begins now.
    pub(crate) fn register(
        &self,
        collective: Collective,
        timeout: Option<Duration>,
        stream: sys::Stream,
        past: &Past,
    ) -> Result<()> {
        let shared = &self.shared;
        if shared.device.is_capturing(stream)? {
            return Ok(());
        }
        let limit = timeout.unwrap_or_else(|| shared.host.timeout())
            + if shared.rail.is_some() { GRACE } else { Duration::ZERO };
        let mut state = shared.lock();
        let seq = state.made;
        state.calls.push(Outstanding { past: past.clone(), collective, seq, since: Instant::now(), limit });
        state.made += 1;
        if state.calls.len() == 1 {
            shared.changed.notify_all();
        }
        Ok(())
    }

    /// A call was enqueued in part: ends it on all ranks.
    pub(crate) fn fail(&self, error: &Error) {
        self.shared.tell(error);
        let mut state = self.shared.lock();
        state.failure.get_or_insert_with(|| error.clone());
        self.shared.changed.notify_all();
    }

    /// What the group failed with, as seen from here.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.shared.lock().failure.clone()
    }

    /// Ends the thread and the communicator; `failed`: without waiting for peers.
    pub(crate) fn end(&self, failed: bool) {
        let shared = &self.shared;
        let mut state = shared.lock();
        state.ending = true;
        shared.changed.notify_all();
        let until = Instant::now() + FAREWELL;
        while !state.gone && Instant::now() < until {
            state = shared.wait(state, Some(POLL));
        }
        drop(state);
        shared.nccl.end(failed);
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

    fn run(&self) {
        if let Err(error) = self.device.enter().and_then(|()| self.device.tolerate_captures()) {
            tracing::warn!(%error, "calls of NCCL are not watched: one whose peers do not come waits for ever");
        } else {
            self.watch();
        }
        let mut state = self.lock();
        state.calls.clear();
        state.gone = true;
        self.changed.notify_all();
    }

    fn watch(&self) {
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
            let mut calls = std::mem::take(&mut state.calls);
            drop(state);
            let found = self.look(&mut calls);
            state = self.lock();
            // Calls made meanwhile come behind.
            calls.append(&mut state.calls);
            state.calls = calls;
            if let Some(error) = found {
                state.failure.get_or_insert(error);
            }
        }
    }

    /// Takes out of `calls` what is over. Why the rest will never be, if so.
    fn look(&self, calls: &mut Vec<Outstanding>) -> Option<Error> {
        let mut found = None;
        calls.retain(|call| match call.past.is_done() {
            Ok(done) => !done,
            Err(error) => {
                found.get_or_insert(error);
                true
            }
        });
        found
            .or_else(|| self.host.failure())
            .or_else(|| self.rail.as_ref()?.failure())
            .or_else(|| self.nccl.health().err())
            .or_else(|| calls.iter().find_map(|call| self.overdue(call)))
    }

    fn overdue(&self, call: &Outstanding) -> Option<Error> {
        let waited = call.since.elapsed();
        (waited >= call.limit).then(|| {
            let (rank, group) = (self.host.rank(), self.host.name().to_owned());
            let site = Site { rank, group, op: call.collective.name().to_owned(), seq: call.seq };
            Error::Timeout { site, waited, missing: Vec::new() }
        })
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
