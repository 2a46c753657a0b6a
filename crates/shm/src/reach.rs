//! Copies between this rank's private memory and its peers', by the kernel (`process_vm_readv`, `process_vm_writev`).

use std::io::{Error, Result};
use std::sync::Arc;

use smddp_core::Region;

use crate::door;
use crate::layout::Memory;
use crate::peers::{Peers, Process};
use crate::segment::Segment;
use crate::sync::{Ordering, enter_fence};

/// Bytes one poll may copy so each way: a system call. Smaller ones cost up to a quarter (docs/performance-log.md).
pub(crate) const AT_ONCE: usize = 1 << 20;

/// The peers' processes, as this rank knows them.
pub(crate) struct Reach {
    me: usize,
    /// By local rank; `None` where this rank knows no name for one.
    pids: Vec<Option<i32>>,
    /// As far as they can be watched.
    processes: Vec<Option<Arc<Process>>>,
    /// Bytes copied so far.
    bytes: u64,
}

impl Reach {
    pub(crate) fn new(me: usize, pids: Vec<Option<i32>>) -> Reach {
        Reach { me, pids, processes: Vec::new(), bytes: 0 }
    }

    /// A reach that knows when a number has become another process's.
    pub(crate) fn watching(me: usize, peers: &Peers) -> Reach {
        Reach { processes: peers.processes().to_vec(), ..Reach::new(me, peers.pids().to_vec()) }
    }

    /// As if `peer` had been a process that has ended, and another had its number now.
    #[cfg(test)]
    pub(crate) fn of_stranger(mut self, peer: usize) -> Reach {
        self.processes = vec![None; self.size()];
        self.processes[peer] = Some(crate::peers::ended());
        self
    }

    /// Whether `peer` is the process it was, as far as can be known.
    pub(crate) fn is_alive(&self, peer: usize) -> bool {
        !matches!(self.processes.get(peer), Some(Some(process)) if process.has_ended())
    }

    /// Ranks of the node.
    pub(crate) fn size(&self) -> usize {
        self.pids.len()
    }

    /// Whether this rank has a name for every peer.
    pub(crate) fn is_whole(&self) -> bool {
        !self.pids.contains(&None)
    }

    /// Bytes copied between this rank's memory and its peers' so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `target` with what lies at `from` in the memory of `peer`. Whether all of it came.
    pub(crate) fn read(&mut self, peer: usize, from: u64, target: Region) -> bool {
        self.note(target.len(), self.pid(peer).and_then(|pid| read_process(pid, from, target)))
    }

    /// Writes `source` to `to` in the memory of `peer`, inside of its `door`. Whether all of it went.
    pub(crate) fn write(
        &mut self,
        peer: usize,
        door: u64,
        to: u64,
        source: Region,
        segment: &Segment,
    ) -> bool {
        let Ok(pid) = self.pid(peer) else { return false };
        if !self.is_alive(peer) {
            return false;
        }
        if !door::enter(segment, peer, self.me) {
            // It tells why by itself.
            return false;
        }
        let went = write_process(pid, to, source, door.wrapping_add(8 * self.me as u64));
        if !matches!(went, Ok(went) if went == source.len()) {
            door::leave(segment, peer, self.me);
        }
        self.note(source.len(), went)
    }

    fn pid(&self, peer: usize) -> Result<i32> {
        self.pids.get(peer).copied().flatten().ok_or_else(|| Error::other("a rank in another container"))
    }

    fn note(&mut self, len: usize, copied: Result<usize>) -> bool {
        if let Err(error) = &copied {
            tracing::debug!(%error, "peers' memory cannot be reached: data goes through shared memory");
        }
        let all = matches!(copied, Ok(copied) if copied == len);
        self.bytes += if all { len as u64 } else { 0 };
        all
    }
}

/// Whether what was read of `peer` until now was still its call's: a rank closes its door before its callers have their
/// memory back.
pub(crate) fn still_stood(segment: &Segment, peer: usize) -> bool {
    enter_fence();
    segment.closed(peer).load(Ordering::Relaxed) == 0
}

/// How many bytes came of those at `from` in process `pid`.
fn read_process(pid: i32, from: u64, target: Region) -> Result<usize> {
    let local = libc::iovec { iov_base: target.as_ptr().cast(), iov_len: target.len() };
    let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: target.len() };
    // SAFETY: `target` is valid and this call's alone (core's R1 of `memory`, T1 of `transport`); the kernel checks the other process's range itself.
    let came = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(came).map_err(|_| Error::last_os_error())
}

/// How many bytes of `source` were written to `to` in process `pid`; if all, that this rank has left its door is, too, behind
/// them: at `inside` (O2 of `door`).
fn write_process(pid: i32, to: u64, source: Region, inside: u64) -> Result<usize> {
    let mut outside = door::OUTSIDE;
    let vector = |base: *mut libc::c_void, iov_len| libc::iovec { iov_base: base, iov_len };
    let word = size_of_val(&outside);
    let local = [vector(source.as_ptr().cast(), source.len()), vector((&raw mut outside).cast(), word)];
    let remote = [vector(to as *mut libc::c_void, source.len()), vector(inside as *mut libc::c_void, word)];
    // SAFETY: `source` is valid and nobody writes to it meanwhile (core's R1 of `memory`); the kernel checks the other process's
    // ranges itself, which that process has offered and keeps for as long as this rank is inside its door (C2, C5 of `single_copy`).
    let went = unsafe { libc::process_vm_writev(pid, local.as_ptr(), 2, remote.as_ptr(), 2, 0) };
    let went = usize::try_from(went).map_err(|_| Error::last_os_error())?;
    // All but the word: then it does not say that this rank has left.
    Ok(if went == source.len() + word { source.len() } else { went.min(source.len().saturating_sub(1)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Agreed, Geometry, Layout};

    /// O2 and C5, with both ranks in this process.
    #[test]
    fn what_is_written_through_an_open_door_is_there_and_nobody_is_left_inside() {
        let layout = Layout::new(Geometry { slot: 4096, slots: 2 }.fitted(2), 2);
        let (segment, _file) = Segment::create(layout, 7, Agreed::default(), 1).unwrap();
        let own = i32::try_from(std::process::id()).ok();
        let mut reach = Reach::new(0, vec![own; 2]);
        let (mut source, mut target) = ([5u8; 100], [0u8; 200]);
        // SAFETY: both outlive the calls below, which alone touch them.
        let source = unsafe { Region::of(&mut source) };
        let (to, door) = (target.as_mut_ptr() as u64, segment.insides(1));
        assert!(reach.write(1, door, to + 33, source, &segment));
        assert_eq!(
            (&target[..33], &target[33..133], &target[133..]),
            (&[0; 33][..], &[5; 100][..], &[0; 67][..])
        );
        assert!(!door::is_inside(&segment, 1, 0) && still_stood(&segment, 1));
        target.fill(0);
        // Memory that is not there, of which the kernel says so: the rank has left all the same.
        assert!(!reach.write(1, door, 4096, source, &segment));
        assert!(!door::is_inside(&segment, 1, 0));
        let mut too_late = Reach::new(0, vec![own; 2]).of_stranger(1);
        assert!(!too_late.write(1, door, to + 33, source, &segment) && too_late.bytes() == 0);
        door::close(&segment, 1, door::Why::Failed);
        assert!(!reach.write(1, door, to + 33, source, &segment));
        assert_eq!((target, reach.bytes()), ([0; 200], 100));
        assert!(!door::is_inside(&segment, 1, 0) && !still_stood(&segment, 1) && still_stood(&segment, 0));
    }
}
