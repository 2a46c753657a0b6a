//! What keeps a process group alive.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;

use pyo3::prelude::*;

/// A share in a group. Its calls have one too: a group that is dropped while one is under way stays until the call is
/// over. The last share takes the group down, which can wait for other threads: with the interpreter detached (**P1**).
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
        let Some(last) = Arc::into_inner(share) else { return };
        let mut last = Some(last);
        // Where the interpreter is gone, the group goes all the same.
        let _ = Python::try_attach(|py| py.detach(|| drop(last.take())));
    }
}
