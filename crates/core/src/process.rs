//! Which process this is, without a system call each time: after a fork everything of ours belongs to the parent, so
//! every call asks.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Random bytes from the kernel.
///
/// # Errors
/// A kernel that has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], Errno> {
    let (mut bytes, mut filled) = ([0; N], 0);
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// A group of this process has failed, or was aborted.
pub(crate) fn note_failure() {
    HAS_FAILED.store(true, Ordering::Relaxed);
}

/// Whether any group ever did: other ranks may then never come to their end.
pub fn has_failed() -> bool {
    HAS_FAILED.load(Ordering::Relaxed)
}

/// As [`std::process::id`].
#[inline]
pub fn id() -> u32 {
    let Some(known) = KNOWN.get_or_init(page) else { return std::process::id() };
    match known.load(Ordering::Relaxed) {
        0 => {
            let id = std::process::id();
            known.store(id, Ordering::Relaxed);
            id
        }
        id => id,
    }
}

/// The number, where a child finds zero instead.
static KNOWN: OnceLock<Option<&'static AtomicU32>> = OnceLock::new();

const PAGE: usize = 4096;

/// A page that the kernel empties in forked children; `None` where it cannot.
fn page() -> Option<&'static AtomicU32> {
    // SAFETY: a new mapping, which nothing else knows.
    let page = unsafe {
        mmap_anonymous(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
            .ok()?
    };
    // SAFETY: the whole of that mapping, whose contents may vanish in children.
    if unsafe { madvise(page, PAGE, Advice::LinuxWipeOnFork) }.is_err() {
        // SAFETY: as above; an error leaves the page mapped, which harms nobody.
        let _ = unsafe { munmap(page, PAGE) };
        return None;
    }
    // SAFETY: mapped for good, aligned, zero at first, and touched through this reference alone.
    Some(unsafe { &*page.cast::<AtomicU32>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_kernels_number_and_known_without_it() {
        assert_eq!(id(), std::process::id());
        let known = KNOWN.get().unwrap().unwrap();
        assert_eq!(known.load(Ordering::Relaxed), std::process::id());
        // As a child finds it.
        known.store(0, Ordering::Relaxed);
        assert_eq!(id(), std::process::id());
    }
}
