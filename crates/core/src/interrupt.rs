//! Waits outside of operations (for ranks that are to come, for a store) that somebody may want to end: Ctrl-C, say.
//!
//! - **I1** it concerns the thread that waits alone: its caller sets what is asked with [`during`], and its waits ask.
//! - **I2** once the answer was yes, it stays so until [`during`] returns: what is waited for on the way out does not delay it.

use std::cell::{Cell, RefCell};
use std::time::Duration;

/// How long a wait goes on without asking.
pub const EVERY: Duration = Duration::from_millis(250);

type Ask = Box<dyn Fn() -> bool>;

thread_local! {
    static ASK: RefCell<Option<Ask>> = const { RefCell::new(None) };
    static CAME: Cell<bool> = const { Cell::new(false) };
    /// Whether there is something to ask: what every call looks at must cost nothing.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `waits`, whose waits end early, with an error, once `ask` says yes. Within another one it changes nothing.
pub fn during<R>(ask: impl Fn() -> bool + 'static, waits: impl FnOnce() -> R) -> R {
    struct Restored;
    impl Drop for Restored {
        fn drop(&mut self) {
            WATCHED.set(false);
            ASK.set(None);
            CAME.set(false);
        }
    }
    if is_watched() {
        return waits();
    }
    ASK.set(Some(Box::new(ask)));
    WATCHED.set(true);
    let _restored = Restored;
    waits()
}

/// Whether this thread's waits may end early.
#[inline]
pub fn is_watched() -> bool {
    WATCHED.get()
}

/// Whether the wait is to end now. For loops that wait, every [`EVERY`].
pub fn came() -> bool {
    if !CAME.get() && ASK.with_borrow(|ask| ask.as_ref().is_some_and(|ask| ask())) {
        CAME.set(true);
    }
    CAME.get()
}

/// The part of a wait until the next look.
pub fn slice(left: Duration) -> Duration {
    if is_watched() { left.min(EVERY) } else { left }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_it_came_it_stays_until_the_end() {
        let answers = RefCell::new(vec![false, true, false]);
        assert!(!came() && slice(Duration::MAX) == Duration::MAX);
        during(
            move || answers.borrow_mut().pop().unwrap_or(false),
            || {
                assert_eq!(slice(Duration::MAX), EVERY);
                assert!(!came());
                assert!(came() && came() && came());
                during(|| false, || assert!(came()));
                assert!(std::thread::spawn(|| !came() && !is_watched()).join().unwrap());
            },
        );
        assert!(!came() && !is_watched());
    }
}
