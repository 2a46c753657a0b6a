//! Meeting for NCCL, which waits for ranks that have failed as for those that are late.
//!
//! Each rank tells its neighbours how it went; who hears of a failure leaves, and names the same rank in turn. Neighbours are
//! the other ranks of its node; where several nodes meet, the first ranks of nodes are neighbours too, in a ring. Who cannot be
//! heard any more, since it died or the group was aborted, is not waited for either.

use std::time::{Duration, Instant};

use smddp_core::communicator::{Communicator, Handle};
use smddp_core::interrupt;
use smddp_core::topology::GroupShape;
use smddp_core::transport::Transports;
use smddp_core::{DType, Error, Region, Result};

use crate::nccl::{Meeting, NcclComm};

/// Of these messages; torch's tags are smaller.
const TAG: u64 = 1 << 40;
const STEP: Duration = Duration::from_millis(5);
/// How much longer messages may take than the meeting.
const GRACE: Duration = Duration::from_secs(5);

/// What a rank says when it has met all others; any other number is that of the rank that failed, plus one.
const WELL: u32 = 0;

/// What another rank tells.
struct Word<T: Transports> {
    rank: usize,
    /// Written by the receive, which is waited for before this is freed.
    place: Box<[u32; 1]>,
    receive: Result<Handle<T>>,
}

impl<T: Transports> Word<T> {
    fn await_from(host: &Communicator<T>, rank: usize, limit: Duration) -> Word<T> {
        let mut place = Box::new([WELL]);
        // SAFETY: `place` stays where it is until `outcome` has waited for the receive.
        let receive = unsafe { host.start_recv(rank, TAG, DType::I32, Region::of(&mut place[..])) };
        let receive = receive.inspect(|handle| handle.set_timeout(limit));
        Word { rank, place, receive }
    }

    /// Why it will never be told: its rank has died, say, or the group was aborted.
    fn lost(&self) -> Option<Error> {
        match &self.receive {
            Ok(handle) => handle.result()?.err(),
            Err(error) => Some(error.clone()),
        }
    }

    /// The rank that failed, by what this one says.
    fn failed(&self) -> Option<usize> {
        let said =
            self.receive.as_ref().is_ok_and(|r| matches!(r.result(), Some(Ok(())))) && self.place[0] != WELL;
        said.then(|| self.place[0] as usize - 1)
    }
}

/// The communicator of `members`, whole nodes; an error as soon as one of them has failed, at the latest when the group's
/// time limit has passed.
pub(crate) fn outcome<T: Transports>(
    host: &Communicator<T>,
    members: &[usize],
    meeting: Result<Meeting>,
) -> Result<NcclComm> {
    let (me, limit) = (host.rank(), host.timeout());
    let neighbours = neighbours(host.shape(), members, me);
    let await_from = |&rank: &usize| Word::await_from(host, rank, limit + GRACE);
    let words: Vec<Word<T>> = neighbours.iter().map(await_from).collect();
    let met = match meeting {
        Ok(meeting) => wait(&meeting, &words, limit, members.len()),
        Err(error) => Err(Failure { rank: None, error }),
    };

    let mut verdict = [met.as_ref().err().map_or(WELL, |failure| failure.rank.unwrap_or(me) as u32 + 1)];
    let tell = |to: &Word<T>, verdict: &mut [u32; 1]| {
        // SAFETY: `verdict` outlives the message, which is waited for here.
        let sent = unsafe { host.start_send(to.rank, TAG, DType::I32, Region::of(&mut verdict[..])) };
        sent.and_then(|message| message.wait(None))
    };
    let mut told = Ok(());
    for word in &words {
        told = told.and(tell(word, &mut verdict));
    }
    // A receive that fails has been withdrawn when its `wait` returns.
    for word in &words {
        told = told.and(word.receive.clone().and_then(|receive| receive.wait(None)));
    }
    let met = met.map_err(|failure| failure.error)?;
    told?;
    match words.iter().find_map(Word::failed) {
        Some(rank) => Err(left(rank)),
        None => Ok(met),
    }
}

fn neighbours(shape: &GroupShape, members: &[usize], me: usize) -> Vec<usize> {
    let node = shape.node_of(me);
    let mut found: Vec<usize> = shape.ranks_on(node).iter().map(|&rank| rank as usize).collect();
    let nodes = shape.node_count();
    if members.len() > found.len() && shape.local_of(me) == 0 {
        found.extend([node + 1, node + nodes - 1].map(|other| shape.ranks_on(other % nodes)[0] as usize));
    }
    found.sort_unstable();
    found.dedup();
    found.retain(|&rank| rank != me);
    found
}

/// Why a rank does not meet the others.
struct Failure {
    /// The rank that failed first; `None`: this one.
    rank: Option<usize>,
    error: Error,
}

fn wait<T: Transports>(
    meeting: &Meeting,
    words: &[Word<T>],
    limit: Duration,
    ranks: usize,
) -> std::result::Result<NcclComm, Failure> {
    let since = Instant::now();
    loop {
        if let Some(met) = meeting.wait(STEP) {
            return met.map_err(|error| Failure { rank: None, error });
        }
        if let Some(rank) = words.iter().find_map(Word::failed) {
            return Err(Failure { rank: Some(rank), error: left(rank) });
        }
        if let Some(error) = words.iter().find_map(Word::lost) {
            let rank = if let Error::PeerLost { peer, .. } = error { Some(peer) } else { None };
            return Err(Failure { rank, error });
        }
        if interrupt::came() {
            let error =
                Error::Transport { transport: "NCCL", reason: "the meeting was interrupted".to_owned() };
            return Err(Failure { rank: None, error });
        }
        if since.elapsed() > limit {
            let reason = format!("not all of {ranks} ranks met within {:.0} s", limit.as_secs_f64());
            let error = Error::Transport { transport: "NCCL", reason };
            return Err(Failure { rank: None, error });
        }
    }
}

fn left(rank: usize) -> Error {
    Error::Transport {
        transport: "NCCL",
        reason: format!("rank {rank} failed in meeting for NCCL; its own error says why"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Word of a failure reaches everybody, whoever it happens to, and who waits for a word is sent one.
    #[test]
    fn neighbours_are_mutual_and_reach_all() {
        let shapes =
            [vec!["a"; 5], vec!["a", "b"], vec!["a", "b", "a", "b", "c", "c", "c"], vec!["a", "b", "c", "d"]];
        for labels in shapes {
            let shape = GroupShape::from_labels(&labels);
            let members: Vec<usize> = (0..labels.len()).collect();
            let all: Vec<Vec<usize>> = members.iter().map(|&me| neighbours(&shape, &members, me)).collect();
            for (me, others) in all.iter().enumerate() {
                assert!(!others.contains(&me));
                assert!(others.iter().all(|&other| all[other].contains(&me)), "{labels:?}: {all:?}");
            }
            let mut reached = vec![0];
            let mut next = 0;
            while let Some(&rank) = reached.get(next) {
                let new: Vec<usize> = all[rank].iter().copied().filter(|r| !reached.contains(r)).collect();
                reached.extend(new);
                next += 1;
            }
            assert_eq!(reached.len(), labels.len(), "{labels:?}: {all:?}");
        }
    }

    #[test]
    fn a_node_that_meets_alone_has_no_neighbours_elsewhere() {
        let shape = GroupShape::from_labels(&["a", "b", "a", "b"]);
        assert_eq!(neighbours(&shape, &[0, 2], 0), vec![2]);
        assert_eq!(neighbours(&shape, &[1, 3], 3), vec![1]);
    }
}
