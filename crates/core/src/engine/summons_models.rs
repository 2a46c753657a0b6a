//! W1 of `summons` under every interleaving (up to a number of preemptions) of who leaves work and the thread that is called to it.
//!
//! The twins do a step of it as it must not be done: that shows that the model can see the mistake.

// Not loom's own, which panics once more when a model that has failed drops it.
use std::sync::Arc;

use loom::sync::atomic::AtomicUsize;
use loom::thread;

use super::*;

const CALLS: [[When; 2]; 4] =
    [[When::Later, When::Later], [When::Later, When::Now], [When::Now, When::Later], [When::Now, When::Now]];

/// Work is left twice, by `raise`; the thread, which parks by `lie_down`, ends when it has seen both.
fn explore(raise: fn(&Summons, When) -> bool, lie_down: fn(&Summons) -> bool) {
    for calls in CALLS {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let shared = Arc::new((Summons::default(), AtomicUsize::new(0)));
            let theirs = Arc::clone(&shared);
            let thread = thread::spawn(move || {
                let (summons, left) = &*theirs;
                let mut seen = 0;
                while seen < calls.len() {
                    if summons.take().is_some() {
                        // What orders it is the word.
                        seen = left.load(Ordering::Relaxed);
                    } else if lie_down(summons) {
                        thread::park();
                    }
                }
            });
            let (summons, left) = &*shared;
            for (number, when) in calls.into_iter().enumerate() {
                left.store(number + 1, Ordering::Relaxed);
                if raise(summons, when) {
                    thread.thread().unpark();
                }
            }
            thread.join().unwrap();
        });
    }
}

#[test]
fn what_is_left_is_seen_without_another_call() {
    explore(Summons::raise, Summons::lie_down);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_thread_that_parks_whatever_the_word_is_found() {
    explore(Summons::raise, |summons| {
        summons.0.store(PARKED, Ordering::Release);
        true
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_look_at_the_word_apart_from_raising_it_is_found() {
    let raise = |summons: &Summons, _| {
        let is_parked = summons.0.load(Ordering::Acquire) == PARKED;
        summons.0.fetch_max(LATER, Ordering::AcqRel);
        is_parked
    };
    explore(raise, Summons::lie_down);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_word_raised_relaxed_is_found() {
    let raise = |summons: &Summons, _| summons.0.fetch_max(LATER, Ordering::Relaxed) == PARKED;
    explore(raise, Summons::lie_down);
}
