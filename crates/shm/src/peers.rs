//! Whether the processes of the node's other ranks still live.
//!
//! One pidfd a peer process, shared by all groups of this process; it costs nothing until it is asked.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use crate::segment::Segment;
use crate::sync::Ordering;

/// A process that is certainly the peer's, even when its pid is used again.
pub(crate) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    pub(crate) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(n) if n > 0)
    }
}

/// A process that has ended, as it was watched.
#[cfg(test)]
pub(crate) fn ended() -> Arc<Process> {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let process = watch(child.id()).unwrap();
    assert!(!process.has_ended());
    child.kill().unwrap();
    child.wait().unwrap();
    process
}

/// The process `pid`, which is alive while this is called. `None` where the kernel does not let us watch it.
fn watch(pid: u32) -> Option<Arc<Process>> {
    static KNOWN: OnceLock<Mutex<HashMap<u32, Weak<Process>>>> = OnceLock::new();
    let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(process) = known.get(&pid).and_then(Weak::upgrade)
        && !process.has_ended()
    {
        return Some(process);
    }
    let pid_value = Pid::from_raw(i32::try_from(pid).ok()?)?;
    match rustix::process::pidfd_open(pid_value, PidfdFlags::empty()) {
        Ok(pidfd) => {
            let process = Arc::new(Process { pidfd });
            known.retain(|_, process| process.strong_count() > 0);
            known.insert(pid, Arc::downgrade(&process));
            Some(process)
        }
        Err(error) => {
            tracing::debug!(pid, %error, "a peer's process cannot be watched");
            None
        }
    }
}

/// Identity of this process's pid namespace; 0 when unknown.
pub(crate) fn pid_space() -> u64 {
    rustix::fs::stat("/proc/self/ns/pid").map_or(0, |s| s.st_ino)
}

/// The processes of a group's local ranks, as far as they can be watched.
pub(crate) struct Peers {
    processes: Vec<Option<Arc<Process>>>,
    /// By local rank; `None` where this process knows no name for it.
    pids: Vec<Option<i32>>,
}

impl Peers {
    /// From the pids in the segment, valid in pid namespace `space`. All peers are alive while this is called.
    pub(crate) fn watch(segment: &Segment, me: usize, space: u64) -> Peers {
        let size = segment.layout().local_size;
        if space == 0 || space != pid_space() {
            return Peers { processes: Vec::new(), pids: vec![None; size] };
        }
        let own = std::process::id();
        let pids: Vec<u32> = (0..size).map(|rank| segment.pid(rank).load(Ordering::Relaxed)).collect();
        let is_watched = |rank: usize, pid: u32| rank != me && pid != own && pid != 0;
        let watch = |(rank, &pid): (usize, &u32)| if is_watched(rank, pid) { watch(pid) } else { None };
        let name = |&pid: &u32| i32::try_from(pid).ok().filter(|&pid| pid > 0);
        Peers {
            processes: pids.iter().enumerate().map(watch).collect(),
            pids: pids.iter().map(name).collect(),
        }
    }

    /// The processes of the local ranks, as far as they have a name here.
    pub(crate) fn pids(&self) -> &[Option<i32>] {
        &self.pids
    }

    /// Those processes, as far as they can be watched; none, where nobody can be.
    pub(crate) fn processes(&self) -> &[Option<Arc<Process>>] {
        &self.processes
    }

    /// Whether the process of a local rank has ended.
    pub(crate) fn has_ended(&self, rank: usize) -> bool {
        self.processes.get(rank).is_some_and(|p| p.as_ref().is_some_and(|p| p.has_ended()))
    }

    /// Local ranks whose process has ended.
    pub(crate) fn ended(&self) -> impl Iterator<Item = usize> {
        (0..self.processes.len()).filter(|&rank| self.has_ended(rank))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Agreed, Geometry, Layout};

    /// Its peers count on it to begin calls as they do, which goes by how many ranks there are.
    #[test]
    fn in_another_pid_space_ranks_are_there_without_names() {
        let layout = Layout::new(Geometry { slot: 4096, slots: 2 }.fitted(3), 3);
        let (segment, _file) = Segment::create(layout, 7, Agreed::default(), 1).unwrap();
        segment.pid(1).store(1, Ordering::Relaxed);
        assert_eq!(Peers::watch(&segment, 0, pid_space()).pids(), [None, Some(1), None]);
        assert_eq!(Peers::watch(&segment, 0, pid_space() + 1).pids(), [None; 3]);
    }
}
