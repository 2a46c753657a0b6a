//! Times in which no stream of this process waits for a word.
//!
//! libfabric asks the driver about device memory that it registers, and is asked to under the engine's seat, since its domains are
//! one thread's at a time. The driver may not answer before a stream is past its wait, and that ends by whoever has the seat.
//!
//! - **S1** an exchange is begun, from its start to the wait for its word, under the lock, shared; it is over when its word
//!   says so.
//! - **S2** what wants quiet has the lock alone, and finds all exchanges over. It waits for them without the lock, and for the lock
//!   outside its queue, which keeps others out: they may need it for what ranks elsewhere wait for.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError, Weak};
use std::time::{Duration, Instant};

use smddp_core::gate::{SLOTS, Words};

/// How often exchanges are looked at.
const STEP: Duration = Duration::from_micros(100);

/// Those of all stagers of this process.
static ALL: RwLock<Vec<Weak<Uses>>> = RwLock::new(Vec::new());

/// The exchanges that a stager has started.
pub(crate) struct Uses {
    words: Arc<Words>,
    /// The last use of each slot in which one was started, by its value.
    started: [AtomicU32; SLOTS],
}

/// Kept while an exchange is begun.
#[must_use]
pub(crate) struct Beginning<'a> {
    uses: &'a Uses,
    _shared: RwLockReadGuard<'static, Vec<Weak<Uses>>>,
}

impl Beginning<'_> {
    pub(crate) fn started(&self, slot: usize, value: u32) {
        self.uses.started[slot].store(value, Ordering::Relaxed);
    }
}

impl Uses {
    pub(crate) fn new(words: &Arc<Words>) -> Arc<Uses> {
        let uses = Arc::new(Uses { words: Arc::clone(words), started: Default::default() });
        let mut all = loop {
            match alone() {
                Some(all) => break all,
                None => std::thread::sleep(STEP),
            }
        };
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&uses));
        uses
    }

    pub(crate) fn begin(&self) -> Beginning<'_> {
        Beginning { uses: self, _shared: ALL.read().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Whether all exchanges are over.
    pub(crate) fn are_over(&self) -> bool {
        let is_over =
            |(slot, started): (usize, &AtomicU32)| self.words.is_left(slot, started.load(Ordering::Relaxed));
        self.started.iter().enumerate().all(is_over)
    }
}

/// The lock, if nobody has it (S2).
fn alone() -> Option<RwLockWriteGuard<'static, Vec<Weak<Uses>>>> {
    match ALL.try_write() {
        Ok(all) => Some(all),
        Err(TryLockError::Poisoned(all)) => Some(all.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Does `what` while no exchange is under way or begun; none: there was no such time until `limit` had passed.
pub(crate) fn quietly<R>(limit: Duration, what: impl FnOnce() -> R) -> Option<R> {
    let since = Instant::now();
    loop {
        if let Some(all) = alone()
            && all.iter().filter_map(Weak::upgrade).all(|uses| uses.are_over())
        {
            return Some(what());
        }
        if since.elapsed() >= limit {
            return None;
        }
        std::thread::sleep(STEP);
    }
}
