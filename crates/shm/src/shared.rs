//! Memory that a rank's peers on the node map too: a memfd of this rank, or memory over a file that somebody else made.
//!
//! Peers open it through `/proc/<pid>/fd`, by the [`Card`] its owner shows them.
//!
//! Invariants
//! - **S1** a mapping covers a file that had at least its length when it was mapped; a memfd of ours is sealed, so it keeps it.
//! - **S2** every byte of a memfd of ours is allocated when it is made: no access faults for lack of memory later.
//! - **S3** what is opened is the file on the card (device and inode), not whatever its number names by now.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use bytemuck::{Pod, Zeroable};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::mm::MapFlags;
use smddp_core::Region;

use crate::error::ShmError;
use crate::memfd;
use crate::peers::pid_space;

/// How a process's peers find its memory. Plain integers, to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Card {
    pid_space: u64,
    pid: u64,
    fd: u64,
    device: u64,
    inode: u64,
    /// Bytes; 0: this rank shares nothing.
    len: u64,
}

impl Card {
    /// Of a rank that shares nothing.
    pub const NONE: Card = Card { pid_space: 0, pid: 0, fd: 0, device: 0, inode: 0, len: 0 };

    /// Whether this rank shares nothing.
    pub fn is_none(&self) -> bool {
        self.len == 0
    }
}

/// Memory over a file; unmapped when dropped, if it was mapped here.
pub struct SharedBuffer {
    base: NonNull<u8>,
    len: usize,
    file: Option<OwnedFd>,
    ours: bool,
}

// SAFETY: an address and a length; R1 makes the users of its regions responsible for what lies there.
unsafe impl Send for SharedBuffer {}
// SAFETY: as above.
unsafe impl Sync for SharedBuffer {}

impl SharedBuffer {
    /// `len` bytes of zeros of a new memfd.
    ///
    /// # Errors
    /// [`ShmError::Memory`] when there is not so much, or a limit forbids it.
    pub fn new(len: usize) -> Result<SharedBuffer, ShmError> {
        if len == 0 {
            return Err(ShmError::Parameters("shared memory of no bytes".to_owned()));
        }
        let file = memfd::create("smddp-shared", len)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len as u64)
            .map_err(|e| memfd::out_of_memory(len, format!("fallocate: {e}")))?;
        let base = map(&file, len)?;
        Ok(SharedBuffer { base, len, file: Some(file), ours: true })
    }

    /// Memory over `file`, from its beginning, that somebody else mapped.
    ///
    /// # Safety
    /// `memory` is such a mapping, and stays it as long as this lives.
    ///
    /// # Errors
    /// [`ShmError::System`] when the file is shorter than `memory`, or has no copy to give.
    pub unsafe fn over(file: BorrowedFd<'_>, memory: Region) -> Result<SharedBuffer, ShmError> {
        let len = memory.len();
        let Some(base) = NonNull::new(memory.as_ptr()).filter(|_| len > 0) else {
            return Err(ShmError::Parameters("shared memory of no bytes".to_owned()));
        };
        let size = rustix::fs::fstat(file).map_err(|e| ShmError::system("fstat", e))?.st_size;
        if (size as u64) < len as u64 {
            return Err(ShmError::system(
                "sharing memory",
                format!("its file has {size} bytes, expected {len}"),
            ));
        }
        let file = file.try_clone_to_owned().map_err(|e| ShmError::system("dup", e))?;
        Ok(SharedBuffer { base, len, file: Some(file), ours: false })
    }

    /// A peer's memory.
    ///
    /// # Errors
    /// [`ShmError::System`] or [`ShmError::Refused`] where this process cannot open it: other pid namespace, other user.
    pub fn of_peer(card: &Card) -> Result<SharedBuffer, ShmError> {
        if card.pid_space == 0 || card.pid_space != pid_space() {
            return Err(ShmError::Refused("a peer's process lies in another pid namespace".to_owned()));
        }
        let path = format!("/proc/{}/fd/{}", card.pid, card.fd);
        let file = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| ShmError::system("opening a peer's memory", format!("{path}: {e}")))?;
        let stat = rustix::fs::fstat(&file).map_err(|e| ShmError::system("fstat", e))?;
        if (stat.st_dev, stat.st_ino) != (card.device, card.inode) || (stat.st_size as u64) < card.len {
            return Err(ShmError::Refused(format!("{path} is not what the peer shares")));
        }
        let len = card.len as usize;
        Ok(SharedBuffer { base: map(&file, len)?, len, file: None, ours: true })
    }

    /// What to show the peers.
    ///
    /// # Errors
    /// [`ShmError::System`] when the system does not describe the file.
    pub fn card(&self) -> Result<Card, ShmError> {
        let Some(file) = &self.file else {
            return Err(ShmError::Parameters("a peer's memory is not this rank's to share".to_owned()));
        };
        let stat = rustix::fs::fstat(file).map_err(|e| ShmError::system("fstat", e))?;
        Ok(Card {
            pid_space: pid_space(),
            pid: u64::from(std::process::id()),
            fd: file.as_raw_fd() as u64,
            device: stat.st_dev,
            inode: stat.st_ino,
            len: self.len as u64,
        })
    }

    /// Closes the file, once all peers have mapped it: the memory stays.
    pub fn close_file(&mut self) {
        self.file = None;
    }

    /// All of it. Whoever uses the region keeps the buffer.
    pub fn region(&self) -> Region {
        // SAFETY: mapped as long as `self` lives (S1).
        unsafe { Region::new(self.base.as_ptr(), self.len) }
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        if self.ours {
            // SAFETY: mapped by this type, and users of its regions kept `self` (R1).
            unsafe { memfd::unmap(self.base, self.len) };
        }
    }
}

/// Populated: else every page faults at its first use, in each process.
fn map(file: impl AsFd, len: usize) -> Result<NonNull<u8>, ShmError> {
    memfd::map(file, len, MapFlags::POPULATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(buffer: &SharedBuffer, at: usize, byte: u8) {
        let region = buffer.region().slice(at, 1);
        // SAFETY: mapped as long as the buffer lives, and this test is its only user.
        unsafe { region.as_ptr().write(byte) };
    }

    fn get(buffer: &SharedBuffer, at: usize) -> u8 {
        let region = buffer.region().slice(at, 1);
        // SAFETY: as above.
        unsafe { region.as_ptr().read() }
    }

    #[test]
    fn what_the_owner_writes_the_peer_reads_even_after_the_owner_is_gone() {
        let mut ours = SharedBuffer::new(10_000).unwrap();
        assert!((0..10_000).all(|at| get(&ours, at) == 0));
        let theirs = SharedBuffer::of_peer(&ours.card().unwrap()).unwrap();
        ours.close_file();
        put(&ours, 9_999, 7);
        put(&theirs, 0, 8);
        assert_eq!((get(&theirs, 9_999), get(&ours, 0)), (7, 8));
        drop(ours);
        assert_eq!((get(&theirs, 0), theirs.region().len()), (8, 10_000));
    }

    #[test]
    fn a_card_that_does_not_fit_the_file_is_refused() {
        let ours = SharedBuffer::new(4096).unwrap();
        let card = ours.card().unwrap();
        assert!(SharedBuffer::of_peer(&card).is_ok());
        for wrong in [
            Card { inode: card.inode + 1, ..card },
            Card { device: card.device + 1, ..card },
            Card { len: 4097, ..card },
            Card { pid_space: card.pid_space + 1, ..card },
            Card { fd: 1 << 30, ..card },
            Card::NONE,
        ] {
            assert!(SharedBuffer::of_peer(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn memory_over_a_file_of_another_is_shared_and_left_to_them() {
        let theirs = SharedBuffer::new(4096).unwrap();
        let file = theirs.file.as_ref().unwrap();
        // SAFETY: `theirs` outlives it.
        let over = unsafe { SharedBuffer::over(file.as_fd(), theirs.region()) }.unwrap();
        let peer = SharedBuffer::of_peer(&over.card().unwrap()).unwrap();
        drop(over);
        put(&peer, 5, 1);
        assert_eq!(get(&theirs, 5), 1);
        // SAFETY: nobody accesses it: it is refused.
        let longer = unsafe { Region::new(theirs.base.as_ptr(), 4097) };
        // SAFETY: as above.
        assert!(unsafe { SharedBuffer::over(file.as_fd(), longer) }.is_err());
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        assert!(matches!(SharedBuffer::new(1 << 60), Err(ShmError::Memory { .. })));
        assert!(SharedBuffer::new(0).is_err());
    }
}
