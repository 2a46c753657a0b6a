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
use smddp_core::{Error, Result};
use smddp_cuda_sys as sys;

use crate::device::{Device, Event};
use crate::nccl::NcclComm;

/// How often outstanding calls are looked at.
const POLL: Duration = Duration::from_millis(100);
/// How much later than the exchange on the host, which knows whom it waits for, the device's part is given up.
const GRACE: Duration = Duration::from_secs(1);
/// How long the end waits for the thread.
const FAREWELL: Duration = Duration::from_secs(5);

/// A call whose end the device has not reported yet.
struct Outstanding {
    past: Event,
    site: Site,
    since: Instant,
    limit: Duration,
}

#[derive(Default)]
struct State {
    calls: Vec<Outstanding>,
    spare: Vec<Event>,
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

    /// Everything `stream` was given so far belongs to calls; the newest, `op`, may take `limit` from now on.
    pub(crate) fn register(&self, op: &str, stream: sys::Stream, limit: Option<Duration>) -> Result<()> {
        let shared = &self.shared;
        if shared.device.is_capturing(stream)? {
            return Ok(());
        }
        let mut state = shared.lock();
        let past = match state.spare.pop() {
            Some(event) => event,
            None => Event::new(&shared.device)?,
        };
        past.record(stream)?;
        let (host, seq) = (&shared.host, state.made);
        let site = Site { rank: host.rank(), group: host.name().to_owned(), op: op.to_owned(), seq };
        let limit = limit.unwrap_or_else(|| host.timeout())
            + if shared.rail.is_some() { GRACE } else { Duration::ZERO };
        state.calls.push(Outstanding { past, site, since: Instant::now(), limit });
        state.made += 1;
        if state.calls.len() == 1 {
            shared.changed.notify_all();
        }
        Ok(())
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
        state.spare.clear();
        state.gone = true;
        self.changed.notify_all();
    }

    fn watch(&self) {
        let mut state = self.lock();
        while !state.ending {
            if state.calls.is_empty() {
                state = self.wait(state, None);
                continue;
            }
            state = self.wait(state, Some(POLL));
            let mut calls = std::mem::take(&mut state.calls);
            drop(state);
            let (done, found) = self.look(&mut calls);
            state = self.lock();
            state.spare.extend(done);
            // Calls made meanwhile come behind.
            calls.append(&mut state.calls);
            state.calls = calls;
            if let Some(error) = found {
                state.failure = Some(error.clone());
                drop(state);
                return self.fail(&error);
            }
        }
    }

    /// Takes out of `calls` what is over. Its events; and why the rest will never be, if so.
    fn look(&self, calls: &mut Vec<Outstanding>) -> (Vec<Event>, Option<Error>) {
        let mut found = None;
        let (over, rest): (Vec<_>, Vec<_>) =
            std::mem::take(calls).into_iter().partition(|call| match call.past.is_done() {
                Ok(done) => done,
                Err(error) => {
                    found.get_or_insert(error);
                    false
                }
            });
        *calls = rest;
        let found = found
            .or_else(|| self.host.failure())
            .or_else(|| self.rail.as_ref()?.failure())
            .or_else(|| self.nccl.health().err())
            .or_else(|| calls.iter().find_map(Outstanding::overdue));
        (over.into_iter().map(|call| call.past).collect(), found)
    }

    fn fail(&self, error: &Error) {
        tracing::warn!(%error, group = self.host.name(), "ending NCCL's calls");
        // First what tells the other ranks and releases streams that wait for words, then the kernels.
        let reason = error.to_string();
        if self.host.failure().is_none() {
            self.host.abort(&reason);
        }
        if let Some(rail) = self.rail.as_ref().filter(|r| r.failure().is_none()) {
            rail.abort(&reason);
        }
        self.nccl.end(true);
    }
}

impl Outstanding {
    fn overdue(&self) -> Option<Error> {
        let waited = self.since.elapsed();
        (waited >= self.limit).then(|| Error::Timeout {
            site: self.site.clone(),
            waited,
            missing: Vec::new(),
        })
    }
}
