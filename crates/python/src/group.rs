//! What keeps the runtime's objects alive, and how they end.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;

use pyo3::prelude::*;

use crate::ending;

/// Something whose end can wait for other threads, or ranks: it ends with the interpreter detached (**P1**), and not at all where the
/// process ends without leaving its groups.
pub struct Detached<T: Send>(ManuallyDrop<T>);

impl<T: Send> Detached<T> {
    pub fn new(inner: T) -> Detached<T> {
        Detached(ManuallyDrop::new(inner))
    }
}

impl<T: Send> Deref for Detached<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send> Drop for Detached<T> {
    fn drop(&mut self) {
        // SAFETY: taken here alone, and nobody sees the field afterwards.
        let mut inner = Some(unsafe { ManuallyDrop::take(&mut self.0) });
        if ending::stays() {
            return std::mem::forget(inner);
        }
        // Where the interpreter is gone, it ends all the same.
        let _ = Python::try_attach(|py| py.detach(|| drop(inner.take())));
    }
}

/// A share in a group. Its calls have one too: a group that is dropped while one is under way stays until the call is
/// over. The last share takes the group down, unless the process ends without leaving its groups.
pub struct Group(ManuallyDrop<Arc<smddp::Communicator>>);

impl Group {
    pub fn new(inner: smddp::Communicator) -> Group {
        Group(ManuallyDrop::new(Arc::new(inner)))
    }

    /// For threads without the interpreter, which must not wait for it (**P3**).
    pub fn leave_without_python(self) {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so the share is taken once.
        drop(unsafe { ManuallyDrop::take(&mut this.0) });
    }
}

impl Clone for Group {
    fn clone(&self) -> Group {
        Group(ManuallyDrop::new(Arc::clone(&self.0)))
    }
}

impl Deref for Group {
    type Target = smddp::Communicator;

    fn deref(&self) -> &smddp::Communicator {
        &self.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: taken here alone, and nobody sees the field afterwards.
        let share = unsafe { ManuallyDrop::take(&mut self.0) };
        drop(Arc::into_inner(share).map(Detached::new));
    }
}
