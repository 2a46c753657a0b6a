//! S1 and S2 of `seat_flags` under every interleaving (up to a number of preemptions), with the progress thread as `summons` has it.
//!
//! The twins lack a fence, or look too early: that shows that the model can see the mistake, and that the fence is needed.

// Not loom's own, which panics once more when a model that has failed drops it.
use std::sync::Arc;

use loom::sync::{Condvar, Mutex, Notify};
use loom::thread;

use super::*;
use crate::engine::summons::{Summons, When};

/// A number that a sleeper waits to see changed: a driver's bell, an operation's state.
#[derive(Default)]
struct Bell {
    rings: Mutex<u32>,
    changed: Condvar,
}

impl Bell {
    fn value(&self) -> u32 {
        *self.rings.lock().unwrap()
    }

    fn ring(&self) {
        *self.rings.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    fn wait(&self, value: u32) {
        let mut rings = self.rings.lock().unwrap();
        while *rings == value {
            rings = self.changed.wait(rings).unwrap();
        }
    }
}

fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(run);
}

/// A driver dozes by `doze` until it sees what another thread does by `call`, which says whether to ring.
fn explore_sleep(
    sees: fn(&SeatFlags) -> bool,
    doze: fn(&SeatFlags, &dyn Fn()),
    call: fn(&SeatFlags) -> bool,
) {
    model(move || {
        let shared = Arc::new((SeatFlags::default(), Bell::default()));
        let theirs = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            let (flags, bell) = &*theirs;
            while !sees(flags) {
                let value = bell.value();
                doze(flags, &|| bell.wait(value));
            }
        });
        let (flags, bell) = &*shared;
        if call(flags) {
            bell.ring();
        }
        driver.join().unwrap();
    });
}

fn doze(flags: &SeatFlags, sleep: &dyn Fn()) {
    flags.doze(|| false, sleep);
}

fn submit(flags: &SeatFlags) -> bool {
    flags.submit(1)
}

#[test]
fn a_driver_that_sleeps_hears_of_submissions_and_of_who_wants_the_seat() {
    explore_sleep(SeatFlags::has_submissions, doze, submit);
    explore_sleep(SeatFlags::is_wanted, doze, SeatFlags::want);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_sleep_without_a_fence_is_found() {
    let doze = |flags: &SeatFlags, sleep: &dyn Fn()| {
        flags.is_asleep.store(true, Ordering::SeqCst);
        if !flags.has_submissions() {
            sleep();
        }
        flags.is_asleep.store(false, Ordering::SeqCst);
    };
    explore_sleep(SeatFlags::has_submissions, doze, submit);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_submission_without_a_fence_is_found() {
    let submit = |flags: &SeatFlags| {
        flags.submitted.store(1, Ordering::SeqCst);
        flags.is_asleep.load(Ordering::SeqCst)
    };
    explore_sleep(SeatFlags::has_submissions, doze, submit);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_want_without_a_fence_is_found() {
    let want = |flags: &SeatFlags| {
        flags.wanted.fetch_add(1, Ordering::SeqCst);
        flags.is_asleep.load(Ordering::SeqCst)
    };
    explore_sleep(SeatFlags::is_wanted, doze, want);
}

/// A process with one operation, which is done once somebody drives.
struct Process {
    flags: SeatFlags,
    summons: Summons,
    inbox: AtomicBool,
    lock: SeatLock,
    is_done: AtomicBool,
    /// Its end, for one who sleeps until then.
    end: Notify,
    progress: Mutex<Option<thread::Thread>>,
}

/// The driver's lock, with the accesses of the standard library's: loom's own lets who tries it wait.
struct SeatLock {
    is_taken: AtomicBool,
    /// Whether the operation is under way. Its holder's.
    under_way: AtomicBool,
}

struct Seat<'a>(&'a SeatLock);

impl Seat<'_> {
    fn set(&self, under_way: bool) -> bool {
        self.0.under_way.swap(under_way, Ordering::Relaxed)
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.is_taken.swap(false, Ordering::Release);
    }
}

type Leave = fn(&SeatFlags) -> Found;
type SleepUnless = for<'a> fn(&'a Process, &dyn Fn()) -> Option<Seat<'a>>;

impl Process {
    fn new(is_submitted: bool) -> Process {
        Process {
            flags: SeatFlags::default(),
            summons: Summons::default(),
            inbox: AtomicBool::new(false),
            lock: SeatLock { is_taken: AtomicBool::new(false), under_way: AtomicBool::new(!is_submitted) },
            is_done: AtomicBool::new(false),
            end: Notify::new(),
            progress: Mutex::new(None),
        }
    }

    fn try_seat(&self) -> Option<Seat<'_>> {
        let taken = self.lock.is_taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok().then(|| Seat(&self.lock))
    }

    fn is_done(&self) -> bool {
        self.is_done.load(Ordering::Acquire)
    }

    fn drive(&self, seat: &Seat<'_>) {
        if self.flags.has_submissions() {
            if self.inbox.swap(false, Ordering::AcqRel) {
                seat.set(true);
            }
            self.flags.take(0);
        }
        if seat.set(false) {
            self.is_done.store(true, Ordering::Release);
            self.end.notify();
        }
    }

    fn call(&self, when: When) {
        self.summons.call_by(when, || {
            let thread = self.progress.lock().unwrap().clone();
            thread.into_iter().for_each(|thread| thread.unpark());
        });
    }

    /// As the engine leaves its seat.
    fn leave(&self, seat: Seat<'_>, leave: Leave) {
        let under_way = self.lock.under_way.load(Ordering::Relaxed);
        drop(seat);
        let found = leave(&self.flags);
        if found.submitted || (under_way && found.sleepers) {
            self.call(When::Now);
        } else if under_way {
            self.call(When::Later);
        }
    }

    /// As a caller waits.
    fn wait(&self, leave: Leave, sleep_unless: SleepUnless) {
        let mut seat = None;
        while !self.is_done() {
            match seat.take().or_else(|| self.try_seat()) {
                Some(driver) => {
                    self.drive(&driver);
                    self.leave(driver, leave);
                }
                None => seat = sleep_unless(self, &|| self.end.wait()),
            }
        }
    }

    /// The progress thread, whose nap never ends: it does what it is called to at once.
    fn progress(&self, leave: Leave) {
        while !self.is_done() {
            match self.summons.take() {
                Some(When::Now) => {
                    let Some(seat) = self.try_seat() else { continue };
                    self.drive(&seat);
                    drop(seat);
                    if leave(&self.flags).submitted {
                        self.call(When::Now);
                    }
                }
                Some(When::Later) => {}
                None => self.summons.park_by(thread::park),
            }
        }
    }
}

/// One thread has the seat and leaves it; another waits for the operation, which lies in the inbox, or is left under way.
fn explore_leaving(is_submitted: bool, leave: Leave, sleep_unless: SleepUnless) {
    model(move || {
        let process = Arc::new(Process::new(is_submitted));
        let theirs = Arc::clone(&process);
        let progress = thread::spawn(move || theirs.progress(leave));
        *process.progress.lock().unwrap() = Some(progress.thread().clone());
        let theirs = Arc::clone(&process);
        let waiter = thread::spawn(move || {
            if is_submitted {
                theirs.inbox.store(true, Ordering::Release);
                theirs.flags.submit(1);
            }
            theirs.wait(leave, sleep_unless);
        });
        if let Some(seat) = process.try_seat() {
            process.leave(seat, leave);
        }
        waiter.join().unwrap();
        process.call(When::Now);
        progress.join().unwrap();
    });
}

fn sleep_unless<'a>(process: &'a Process, sleep: &dyn Fn()) -> Option<Seat<'a>> {
    process.flags.sleep_unless(|| process.try_seat(), sleep)
}

#[test]
fn what_was_submitted_while_the_seat_was_taken_is_driven() {
    explore_leaving(true, SeatFlags::leave, sleep_unless);
}

#[test]
fn a_sleeper_does_not_wait_for_a_nap() {
    explore_leaving(false, SeatFlags::leave, sleep_unless);
}

fn looks(flags: &SeatFlags) -> Found {
    Found {
        submitted: flags.submitted.load(Ordering::SeqCst) > 0,
        sleepers: flags.sleepers.load(Ordering::SeqCst) > 0,
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_leave_without_a_fence_loses_what_was_submitted() {
    explore_leaving(true, looks, sleep_unless);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_leave_without_a_fence_loses_a_sleeper() {
    explore_leaving(false, looks, sleep_unless);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_sleep_without_another_look_is_found() {
    let sleep_unless: SleepUnless = |process, sleep| {
        process.flags.sleepers.fetch_add(1, Ordering::SeqCst);
        sleep();
        process.flags.sleepers.fetch_sub(1, Ordering::SeqCst);
        None
    };
    explore_leaving(false, SeatFlags::leave, sleep_unless);
}
