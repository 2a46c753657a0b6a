//! One engine a process: drives all groups' operations.
//!
//! Whoever waits *helps*: it takes the driver's seat (the lock of [`Driver`]) and polls until its operation is done, so a blocking
//! call costs no thread hand-over. A progress thread takes the seat while operations are under way and nobody helps.
//!
//! Invariants
//! - **E1** all transport state is touched only by the holder of the driver's lock.
//! - **E2** while operations are pending, either a thread holds the seat, or whoever left it last has called the progress thread
//!   (`summons`; `seat_flags`). So a thread that finds the seat taken need not queue for it.
//! - **E3** a driver that sleeps is woken by a submission, and by who wants the seat (`seat_flags`).
//! - **E4** callbacks run with no lock held, on threads of their own.
//! - **E5** with a fabric, somebody polls it every [`idle::LISTEN`] at the latest, work or none: peers that withdraw a group
//!   wait for our answer.
//! - **E6** in a forked child nobody takes the seat: transports, and memory that ranks share, are the parent's.
//! - **E7** when a driver panics every group fails, so that peers leave this process's memory alone, before anybody is told and has his
//!   memory back. If that panics as well, the process ends.

mod callbacks;
pub mod driver;
pub mod execution;
pub mod graph;
pub mod group;
pub mod idle;
pub mod numbers;
pub mod op;
mod seat_flags;
pub mod staging;
mod summons;

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::call::Call;
use crate::error::{Error, Result, Site};
use crate::memory::Owner;
use crate::process;
use crate::settings::Settings;
use crate::transport::{Bell, Fabric, Patience, Transports};
use crate::yields::{self, Yields};
use callbacks::Callbacks;
use driver::{Bed, Driver};
use group::{Immediate, Seat, Tried};
use idle::{Idle, Pace, Step};
use op::{GroupKey, OpState, PointToPoint};
use seat_flags::SeatFlags;
use summons::{Nap, Summons, When};

/// A yield costs about a microsecond where nobody else wants the core.
const CALLER: Pace = Pace { spins: u32::MAX, yields: 500, look_out: yields::LOOK_OUT };
/// The progress thread shares its core with the user's compute: it hardly spins.
const THREAD: Pace = Pace { spins: 20, yields: 50, look_out: Duration::ZERO };
/// A transport that looks for one thing alone looks so often in the time of a driver's turn.
const LOOKS_PER_SPIN: u32 = 4;
/// Yields of a call on its caller's stack before it becomes an operation: where ranks share cores, the peer that it waits for mostly
/// needs one or two turns of the core, and an operation costs more than a yield (docs/performance-log.md).
const YIELDS_AT_ONCE: u32 = 50;
/// A clock read costs as much as a poll; a turn copies about a slot or a MiB at most (T4).
const TURNS_PER_LOOK: u32 = 64;

struct Shared<T: Transports> {
    inbox: Mutex<Vec<Arc<OpState>>>,
    driver: Mutex<Driver<T>>,
    flags: SeatFlags,
    /// What the progress thread has been called to.
    summons: Summons,
    thread_drives: AtomicBool,
    /// Who drives sleeps where no bell is heard.
    deaf: AtomicBool,
    /// There is a fabric: peers may have news for a process that has no work (E5).
    listens: AtomicBool,
    bell: Mutex<Option<Arc<dyn Bell>>>,
    stop: AtomicBool,
    /// A driver has panicked (E7). Set with the inbox locked.
    is_dead: AtomicBool,
    spins: AtomicU32,
    yields: Yields,
    callbacks: Callbacks,
}

pub struct Engine<T: Transports> {
    shared: Arc<Shared<T>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    process: u32,
}

impl<T: Transports> Engine<T> {
    pub fn new(settings: &Settings) -> Result<Engine<T>>
    where
        T::Fabric: 'static,
    {
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Vec::new()),
            driver: Mutex::new(Driver::new(settings.number("SMDDP_STAGING"))),
            flags: SeatFlags::default(),
            summons: Summons::default(),
            thread_drives: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            listens: AtomicBool::new(false),
            bell: Mutex::new(None),
            stop: AtomicBool::new(false),
            is_dead: AtomicBool::new(false),
            spins: AtomicU32::new(settings.number("SMDDP_SPIN") as u32),
            yields: Yields::default(),
            callbacks: Callbacks::default(),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("smddp-progress".to_owned())
            .spawn(move || run_progress(&for_thread))
            .map_err(|e| Error::Resource {
                what: "starting the progress thread".to_owned(),
                resource: "threads",
                reason: e.to_string(),
                hint: "Raise the process limit (ulimit -u)".to_owned(),
            })?;
        Ok(Engine { shared, thread: Mutex::new(Some(thread)), process: process::id() })
    }

    /// Whether this is the process that made the engine: a forked child inherits the memory, not the thread.
    pub fn is_ours(&self) -> bool {
        self.process == process::id()
    }

    /// Whether a driver has panicked: nothing works here any more (E7).
    pub fn is_dead(&self) -> bool {
        self.shared.is_dead.load(Ordering::Relaxed)
    }

    /// Ranks of this node outnumber its cores: nobody may spin.
    pub fn set_crowded(&self) {
        self.shared.spins.store(0, Ordering::Relaxed);
    }

    /// The fabric, made by `open` when there is none yet.
    pub fn with_fabric<R>(
        &self,
        open: impl FnOnce() -> Result<T::Fabric>,
        use_it: impl FnOnce(&mut T::Fabric) -> Result<R>,
    ) -> Result<R> {
        self.with_seat(|driver| {
            if driver.fabric.is_none() {
                let mut fabric = open()?;
                fabric.register(driver.staging.whole()?, Owner::Host)?;
                driver.fabric = Some(fabric);
                self.shared.listens.store(true, Ordering::Relaxed);
                // Asleep for good until now.
                self.wake_thread();
            }
            match driver.fabric.as_mut() {
                Some(fabric) => use_it(fabric),
                None => Err(Error::Internal("the fabric vanished".to_owned())),
            }
        })?
    }

    /// Has the fabric do something, where there is one.
    pub fn with_fabric_if_any(&self, use_it: impl FnOnce(&mut T::Fabric) -> Result<()>) -> Result<()> {
        self.with_seat(|driver| driver.fabric.as_mut().map_or(Ok(()), use_it))?
    }

    pub fn fabric_info<R>(&self, look: impl FnOnce(&T::Fabric) -> R) -> Option<R> {
        self.with_seat(|driver| driver.fabric.as_ref().map(look)).ok()?
    }

    /// Seats a group: its key, and where its failure will be once it has failed.
    pub fn add(&self, seat: Seat<T::Local>) -> Result<(GroupKey, Arc<OnceLock<Error>>)> {
        self.with_seat(|driver| {
            let key = driver.add(seat)?;
            Ok((key, driver.group(key).map(|group| group.failure_place()).unwrap_or_default()))
        })?
    }

    /// Groups alive in this process.
    pub fn groups(&self) -> usize {
        self.with_seat(|driver| driver.group_count()).unwrap_or(0)
    }

    /// Lets the group's work end, for at most `limit`; then takes it away. Why it had failed, if it had.
    pub fn remove(&self, group: GroupKey, limit: Duration) -> Option<Error> {
        let until = Instant::now() + limit;
        loop {
            let round = self.with_seat(|driver| {
                let mut ended = |d: &mut Driver<T>| {
                    !d.group(group).is_some_and(|g| g.is_busy()) || Instant::now() > until
                };
                self.shared.drive(driver, &mut ended, Some(until), CALLER);
                ended(driver).then(|| driver.remove(group))
            });
            match round {
                Ok(None) => {}
                Ok(Some(failure)) => return failure,
                Err(forked) if !self.is_ours() => return Some(forked),
                Err(panicked) => {
                    // Nothing of the group is under way (E7).
                    let mut driver = self.shared.driver.lock().unwrap_or_else(PoisonError::into_inner);
                    return driver.remove(group).or(Some(panicked));
                }
            }
        }
    }

    /// Has the group's node transport do something.
    pub fn with_local<R>(
        &self,
        group: GroupKey,
        use_it: impl FnOnce(&mut T::Local) -> Result<R>,
    ) -> Result<R> {
        self.with_seat(|driver| match driver.group(group) {
            Some(group) => use_it(&mut group.seat.local),
            None => Err(Error::Internal(format!("no group {group:?}"))),
        })?
    }

    /// Fails the group on every rank.
    pub fn abort(&self, group: GroupKey, error: &Error) -> Result<()> {
        self.with_seat(|driver| driver.abort(group, error))
    }

    /// Takes in what peers have said of the group. Takes the seat for it, which may take as long as a driver's nap.
    pub fn look(&self, group: GroupKey) {
        // A driver that panicked has nothing to say.
        let _ = self.with_seat(|driver| driver.look_at(group));
    }

    /// As [`look`](Self::look), if nobody has the seat; never waits.
    pub fn look_if_free(&self, group: GroupKey) {
        if self.is_ours()
            && let Some(mut driver) = self.free_seat()
        {
            driver.look_at(group);
        }
    }

    /// A rank of this node, of the group, whose process has ended.
    pub fn ended_peer(&self, group: GroupKey) -> Option<Error> {
        self.with_seat(|driver| driver.group(group)?.ended_peer()).ok()?
    }

    /// Takes the driver's seat, from whoever drives, for `what`.
    fn with_seat<R>(&self, what: impl FnOnce(&mut Driver<T>) -> R) -> Result<R> {
        self.check_process(Site::unknown)?;
        let mut driver = self.seated(self.shared.seat()?);
        Ok(what(&mut driver))
    }

    /// The seat, if nobody has it or waits for it: calls without a pause would keep it from them. What lies in the inbox was submitted
    /// before, and is started.
    fn free_seat(&self) -> Option<Seated<'_, T>> {
        if self.shared.flags.is_wanted() {
            return None;
        }
        let mut driver = self.seated(self.shared.driver.try_lock().ok()?);
        self.shared.take_inbox(&mut driver);
        Some(driver)
    }

    #[inline]
    fn seated<'a>(&'a self, driver: MutexGuard<'a, Driver<T>>) -> Seated<'a, T> {
        Seated { engine: self, driver: ManuallyDrop::new(driver), is_unwinding: std::thread::panicking() }
    }

    /// Refuses a forked child (E6).
    fn check_process(&self, site: impl FnOnce() -> Site) -> Result<()> {
        if self.is_ours() { Ok(()) } else { Err(Error::forked(site())) }
    }

    /// Starts an operation, moves what can be moved at once, and returns. May wait for as long as a turn of the progress thread
    /// takes.
    pub fn submit(&self, op: Arc<OpState>) {
        self.submit_from(self.free_seat(), op);
    }

    /// As [`submit`](Self::submit), by a caller who may hold the seat already.
    fn submit_from(&self, seat: Option<Seated<'_, T>>, op: Arc<OpState>) {
        let shared = &self.shared;
        let seat = seat.or_else(|| {
            // Called to the inbox, the thread would be in its caller's way again when that waits.
            let from_thread = op.is_brief()
                && shared.thread_drives.load(Ordering::Acquire)
                && !shared.deaf.load(Ordering::Relaxed);
            let mut driver = self.seated(from_thread.then(|| shared.seat().ok())??);
            shared.take_inbox(&mut driver);
            Some(driver)
        });
        match seat {
            Some(mut driver) => {
                driver.start(op);
                driver.turn();
            }
            None => {
                shared.put(op);
                self.wake_thread();
            }
        }
    }

    /// Starts an operation and helps until it is done or `limit` has passed.
    pub fn run(&self, op: &Arc<OpState>, limit: Option<Duration>) -> Result<()> {
        match self.free_seat() {
            Some(mut driver) => {
                driver.start(Arc::clone(op));
                self.wait_seated(Some(driver), op, limit)
            }
            None => {
                self.shared.put(Arc::clone(op));
                self.wait_seated(None, op, limit)
            }
        }
    }

    /// Runs a call on its caller's stack, without an operation, where nobody drives or wants to and its group has nothing
    /// under way; an operation that it becomes was helped as by [`run`](Self::run).
    pub fn run_now(&self, group: GroupKey, call: &Immediate<'_>, limit: Option<Duration>) -> Tried {
        let Some(mut driver) = self.free_seat() else { return Tried::NotNow };
        let mut patience = self.patience(driver.is_idle());
        let tried = driver.run_now(group, call, &mut patience);
        match &tried {
            Tried::Later(op) => {
                // The operation knows how it ended.
                let _ = self.wait_seated(Some(driver), op, limit);
            }
            Tried::Done | Tried::NotNow => {
                // Whoever makes one such call after the other keeps the seat from the thread.
                if !driver.is_idle() {
                    driver.turn();
                }
            }
        }
        tried
    }

    /// Moves a message of a call on the spot, where nobody drives or wants to, or else submits it as the operation that `op` makes.
    /// Who `waits` for it anyway waits a little on the spot.
    pub fn message(
        &self,
        group: GroupKey,
        (message, call): (&PointToPoint, &Call),
        waits: bool,
        op: impl FnOnce() -> Arc<OpState>,
    ) -> Option<Arc<OpState>> {
        let mut seat = self.free_seat();
        if let Some(driver) = &mut seat {
            let mut patience = if waits { self.patience(driver.is_idle()) } else { Patience::of_looks(0) };
            if driver.group(group).is_some_and(|group| group.message_now(message, call, &mut patience)) {
                // As in `run_now`.
                if !driver.is_idle() {
                    driver.turn();
                }
                return None;
            }
        }
        let op = op();
        self.submit_from(seat, Arc::clone(&op));
        Some(op)
    }

    /// Of a call on its caller's stack, in an engine that `is_idle` or not.
    fn patience(&self, is_idle: bool) -> Patience<'_> {
        let looks = self.shared.spins.load(Ordering::Relaxed).saturating_mul(LOOKS_PER_SPIN);
        // What other groups have under way goes on meanwhile only if this call becomes an operation.
        let yields = if is_idle { YIELDS_AT_ONCE } else { 0 };
        Patience::new(looks, yields, self.shared.flags.wanted(), &self.shared.yields)
    }

    /// Helps until `op` is done or `limit` has passed; passing the limit leaves the operation as it is.
    pub fn wait(&self, op: &Arc<OpState>, limit: Option<Duration>) -> Result<()> {
        if let Some(result) = op.result() {
            return result.clone();
        }
        self.check_process(|| op.site())?;
        self.wait_seated(None, op, limit)
    }

    /// As [`wait`](Self::wait), by a caller who may hold the seat already.
    fn wait_seated<'a>(
        &'a self,
        mut seat: Option<Seated<'a, T>>,
        op: &Arc<OpState>,
        limit: Option<Duration>,
    ) -> Result<()> {
        // Beyond what a clock counts to there is none.
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        let late = || until.is_some_and(|u| Instant::now() >= u);
        let mut enough = |_: &mut Driver<T>| op.is_done();
        loop {
            if seat.is_none()
                && let Some(result) = op.result()
            {
                return result.clone();
            }
            match seat.take().map_or_else(|| self.shared.driver.try_lock().map(|d| self.seated(d)), Ok) {
                Ok(mut driver) => {
                    self.shared.drive(&mut driver, &mut enough, until, CALLER);
                    drop(driver);
                    while self.shared.flags.is_wanted() && !op.is_done() {
                        std::thread::yield_now();
                    }
                }
                Err(TryLockError::WouldBlock) if self.shared.thread_drives.load(Ordering::Acquire) => {
                    self.with_seat(|driver| self.shared.drive(driver, &mut enough, until, CALLER))?;
                }
                Err(TryLockError::WouldBlock) => seat = self.sleep_on(op),
                Err(TryLockError::Poisoned(left)) => return Err(self.shared.poisoned(left.into_inner())),
            }
            if late() && !op.is_done() {
                return Err(op.timeout_error(Vec::new()));
            }
        }
    }

    /// Sleeps until `op` is done or a while has passed, unless the seat is free by now.
    fn sleep_on(&self, op: &OpState) -> Option<Seated<'_, T>> {
        let free = || self.shared.driver.try_lock().ok();
        let seat = self.shared.flags.sleep_unless(free, || op.sleep(idle::LONGEST_SLEEP));
        seat.map(|driver| self.seated(driver))
    }

    /// Leaves the seat (E2).
    #[inline]
    fn leave(&self, driver: MutexGuard<'_, Driver<T>>) {
        let left = driver.left();
        let finished = Shared::leave(driver);
        let found = self.shared.flags.leave();
        if found.submitted || (left.is_some() && found.sleepers) {
            self.wake_thread();
        } else if let Some(when) = left {
            self.call_thread(when);
        }
        self.shared.hand_over(finished);
    }

    /// Calls the progress thread to what is under way: somebody wants it done who does not wait.
    pub fn wake_thread(&self) {
        self.call_thread(When::Now);
    }

    fn call_thread(&self, when: When) {
        self.shared.summons.call(when, || {
            let handle = self.thread.lock().ok()?;
            handle.as_ref().map(|handle| handle.thread().clone())
        });
    }
}

/// The driver's seat, taken by a caller. Who drops it has left it as E2 asks, or in a panic as E7 does: nothing is asked of a driver
/// but through this, or by the progress thread.
struct Seated<'a, T: Transports> {
    engine: &'a Engine<T>,
    driver: ManuallyDrop<MutexGuard<'a, Driver<T>>>,
    /// It was taken in a panic: by what ends a group or the process then.
    is_unwinding: bool,
}

impl<T: Transports> Deref for Seated<'_, T> {
    type Target = Driver<T>;

    fn deref(&self) -> &Driver<T> {
        &self.driver
    }
}

impl<T: Transports> DerefMut for Seated<'_, T> {
    fn deref_mut(&mut self) -> &mut Driver<T> {
        &mut self.driver
    }
}

impl<T: Transports> Drop for Seated<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: it is not used again: `self` ends here.
        let driver = unsafe { ManuallyDrop::take(&mut self.driver) };
        if self.is_unwinding || !std::thread::panicking() {
            self.engine.leave(driver);
        } else {
            self.engine.shared.give_up(driver);
        }
    }
}

impl<T: Transports> Drop for Engine<T> {
    fn drop(&mut self) {
        if !self.is_ours() {
            // The thread does not exist in a forked child; what it would clean up belongs to the parent.
            if let Ok(mut thread) = self.thread.lock() {
                std::mem::forget(thread.take());
            }
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        self.shared.ring();
        self.wake_thread();
        let handle = self.thread.lock().ok().and_then(|mut t| t.take());
        if let Some(handle) = handle
            && handle.thread().id() != std::thread::current().id()
        {
            // A progress thread that panicked has said so already.
            let _ = handle.join();
        }
    }
}

impl<T: Transports> Shared<T> {
    fn put(&self, op: Arc<OpState>) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_dead.load(Ordering::Relaxed) {
            drop(inbox);
            let finished = op.finish(Err(panicked())).then_some(op);
            return self.hand_over(finished.into_iter().collect());
        }
        inbox.push(op);
        let rings = self.flags.submit(inbox.len());
        drop(inbox);
        if rings {
            self.ring();
        }
    }

    /// Wakes a driver that sleeps (E3).
    fn ring(&self) {
        if let Ok(bell) = self.bell.lock()
            && let Some(bell) = bell.as_ref()
        {
            bell.ring();
        }
    }

    /// The driver's seat, taken from the progress thread if need be.
    fn seat(&self) -> Result<MutexGuard<'_, Driver<T>>> {
        if self.flags.want() {
            self.ring();
        }
        let guard = self.driver.lock();
        self.flags.has_it();
        guard.map_err(|left| self.poisoned(left.into_inner()))
    }

    /// What is to be said of a driver that panicked, once that is settled (E7).
    #[cold]
    fn poisoned(&self, driver: MutexGuard<'_, Driver<T>>) -> Error {
        self.give_up(driver);
        panicked()
    }

    /// E7. Leaves the seat before callbacks run (E4).
    #[cold]
    fn give_up(&self, mut driver: MutexGuard<'_, Driver<T>>) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_dead.swap(true, Ordering::Relaxed) {
            return;
        }
        let waiting = std::mem::take(&mut *inbox);
        self.flags.take(0);
        drop(inbox);
        if catch_unwind(AssertUnwindSafe(|| driver.give_up(&panicked()))).is_err() {
            // Peers may go on writing into memory whose owners have it back.
            std::process::abort();
        }
        let mut finished = Shared::leave(driver);
        finished.extend(waiting.into_iter().filter(|op| op.finish(Err(panicked()))));
        self.hand_over(finished);
    }

    /// Leaves the seat. What is returned is to be handed over.
    fn leave(mut driver: MutexGuard<'_, Driver<T>>) -> Vec<Arc<OpState>> {
        std::mem::take(&mut driver.finished)
    }

    /// Has callbacks run (E4).
    fn hand_over(&self, finished: Vec<Arc<OpState>>) {
        finished.into_iter().for_each(|op| self.callbacks.run(op));
    }

    fn take_inbox(&self, driver: &mut Driver<T>) {
        if !self.flags.has_submissions() {
            return;
        }
        loop {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            // In order, one at a time, so that the vector keeps its storage.
            if inbox.is_empty() {
                self.flags.take(0);
                return;
            }
            let op = inbox.remove(0);
            self.flags.take(inbox.len());
            drop(inbox);
            driver.start(op);
        }
    }

    /// Polls until `enough` or `until`, or until callbacks wait to be run or another thread wants the seat.
    fn drive(
        &self,
        driver: &mut Driver<T>,
        enough: &mut dyn FnMut(&mut Driver<T>) -> bool,
        until: Option<Instant>,
        pace: Pace,
    ) {
        let spins = self.spins.load(Ordering::Relaxed);
        let mut idle = Idle::new(Pace { spins: spins.min(pace.spins), ..pace }, &self.yields);
        let mut turns: u32 = 0;
        loop {
            self.take_inbox(driver);
            let moved = driver.turn();
            if enough(driver) || !driver.finished.is_empty() || self.flags.is_wanted() {
                return;
            }
            turns = turns.wrapping_add(1);
            let mut look_at_clock = turns.is_multiple_of(TURNS_PER_LOOK);
            if moved {
                idle.reset();
            } else {
                match idle.fruitless() {
                    Step::Spin => std::hint::spin_loop(),
                    Step::Yield => self.yields.give_way(),
                    Step::Sleep => {
                        self.sleep(driver, idle.nap());
                        look_at_clock = true;
                    }
                }
            }
            if look_at_clock {
                driver.look_around();
                if until.is_some_and(|u| Instant::now() >= u) {
                    return;
                }
            }
        }
    }

    /// The progress thread has nothing to do until it is called, or is to listen.
    fn rest(&self, listened: Instant) {
        let listens = self.listens.load(Ordering::Relaxed);
        self.summons.park(listens.then(|| idle::LISTEN.saturating_sub(listened.elapsed())));
    }

    /// Whether the progress thread, which has `listened` then, is to look for news (E5).
    fn is_to_listen(&self, listened: Instant) -> bool {
        self.listens.load(Ordering::Relaxed) && listened.elapsed() >= idle::LISTEN
    }

    fn hear_nothing(&self, sleep: impl FnOnce()) {
        self.deaf.store(true, Ordering::Relaxed);
        sleep();
        self.deaf.store(false, Ordering::Relaxed);
    }

    fn sleep(&self, driver: &mut Driver<T>, nap: Duration) {
        let Some(bed) = driver.lie_down(nap) else {
            // A caller may wait for an operation that another thread is about to put in the inbox.
            return self.hear_nothing(|| std::thread::sleep(idle::SHORT_SLEEP));
        };
        match bed {
            Bed::Nap(limit) => self.hear_nothing(|| std::thread::sleep(limit)),
            Bed::Fabric(limit) => {
                if let Some(fabric) = driver.fabric.as_mut() {
                    self.hear_nothing(|| fabric.doze(limit));
                }
            }
            Bed::Bell(bell, limit) => {
                let value = bell.value();
                if let Ok(mut place) = self.bell.lock() {
                    *place = Some(Arc::clone(&bell));
                }
                let is_called = || self.stop.load(Ordering::SeqCst) || driver.turn();
                self.flags.doze(is_called, || bell.wait(value, limit));
                // It keeps its group's memory mapped.
                if let Ok(mut place) = self.bell.lock() {
                    *place = None;
                }
            }
        }
        driver.rise();
    }
}

fn run_progress<T: Transports>(shared: &Shared<T>) {
    // The panic has been reported by its hook; what waits is told.
    if catch_unwind(AssertUnwindSafe(|| progress(shared))).is_err() {
        shared.give_up(shared.driver.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The progress thread.
fn progress<T: Transports>(shared: &Shared<T>) {
    let (mut nap, mut listened) = (Nap::default(), Instant::now());
    while !shared.stop.load(Ordering::Acquire) {
        let called = shared.summons.take();
        match called {
            None => {
                nap = Nap::default();
                shared.rest(listened);
            }
            Some(When::Later) => nap.take(),
            Some(When::Now) => {}
        }
        let is_time = shared.is_to_listen(listened);
        if called.is_none() && !is_time {
            continue;
        }
        let driver = match shared.driver.try_lock() {
            Ok(driver) => Ok(driver),
            // Who makes one brief call after the other has the seat whenever this thread looks, and no look at the fabric.
            Err(TryLockError::WouldBlock) if is_time => shared.seat(),
            // Who drives calls this thread again if anything is left (E2).
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Poisoned(left)) => Err(shared.poisoned(left.into_inner())),
        };
        let Ok(mut driver) = driver else { return };
        shared.take_inbox(&mut driver);
        if !driver.is_idle() {
            nap = Nap::default();
        }
        shared.thread_drives.store(true, Ordering::Release);
        driver.listen();
        listened = Instant::now();
        // Callers who take the seat again and again look for nobody's time limit but their own.
        driver.look_around();
        shared.drive(&mut driver, &mut |d| d.is_idle() || shared.stop.load(Ordering::Relaxed), None, THREAD);
        if !driver.is_idle() && !shared.flags.is_wanted() {
            shared.summons.call(When::Now, || None);
        }
        shared.thread_drives.store(false, Ordering::Release);
        let finished = Shared::leave(driver);
        // Of who could not have the seat until now.
        if shared.flags.leave().submitted {
            shared.summons.call(When::Now, || None);
        }
        shared.hand_over(finished);
    }
}

fn panicked() -> Error {
    Error::Internal("a thread panicked while it drove progress".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::execution::Route;
    use crate::testing::{MemoryFabric, MemoryNode, MemoryTransports};
    use crate::topology::GroupShape;

    /// E5: somebody listens, whatever goes on here.
    #[test]
    fn a_peer_is_heard_beside_brief_calls_without_a_pause() {
        let mut fabrics = MemoryFabric::new(2, 1);
        let mut peer = fabrics.remove(1);
        let engine = Engine::<MemoryTransports>::new(&Settings::default()).unwrap();
        engine.with_fabric(|| Ok(fabrics.remove(0)), |_| Ok(())).unwrap();
        let seat = Seat {
            id: 7,
            name: "test".into(),
            rank: 0,
            shape: Arc::new(GroupShape::even(2, 1)),
            local: MemoryNode::new(1, 1).remove(0),
            routes: vec![Route::Local(0), Route::Fabric(1)],
        };
        let (_, failure) = engine.add(seat).unwrap();
        let begun = Instant::now();
        for call in 0.. {
            if let Some(seat) = engine.free_seat() {
                std::thread::sleep(idle::LISTEN / 5);
                drop(seat);
            }
            engine.call_thread(When::Later);
            if call == 5 {
                peer.withdraw(7, &[0], Some(&Error::Internal("enough".to_owned())));
            }
            if failure.get().is_some() {
                return;
            }
            assert!(begun.elapsed() < 100 * idle::LISTEN, "it was not heard");
        }
    }
}
