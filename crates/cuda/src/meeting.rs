//! Meeting for NCCL, which waits for ranks that have failed as for those that are late.
//!
//! Each rank tells the others of its node how it went; who hears of a failure leaves, and says so in turn.

use std::time::{Duration, Instant};

use smddp_core::communicator::{Communicator, Handle};
use smddp_core::transport::Transports;
use smddp_core::{DType, Error, Region, Result};

use crate::nccl::{Meeting, NcclComm};

/// Of these messages; torch's tags are smaller.
const TAG: u64 = 1 << 40;
const STEP: Duration = Duration::from_millis(5);
/// How much longer messages may take than the meeting.
const GRACE: Duration = Duration::from_secs(5);

const WELL: u8 = 1;
const FAILED: u8 = 2;

/// What another rank tells.
struct Word<T: Transports> {
    rank: usize,
    /// Written by the receive, which is waited for before this is freed.
    place: Box<[u8; 1]>,
    receive: Result<Handle<T>>,
}

impl<T: Transports> Word<T> {
    fn await_from(host: &Communicator<T>, rank: usize, limit: Duration) -> Word<T> {
        let mut place = Box::new([0u8]);
        // SAFETY: `place` stays where it is until `outcome` has waited for the receive.
        let receive = unsafe { host.start_recv(rank, TAG, DType::U8, Region::of(&mut place[..])) };
        let receive = receive.inspect(|handle| handle.set_timeout(limit));
        Word { rank, place, receive }
    }

    fn says_failed(&self) -> bool {
        self.receive.as_ref().is_ok_and(Handle::is_done) && self.place[0] == FAILED
    }
}

/// The communicator of `node`'s ranks; an error as soon as one of them has failed, at the latest when the group's time
/// limit has passed.
pub(crate) fn outcome<T: Transports>(
    host: &Communicator<T>,
    node: &[u32],
    meeting: Result<Meeting>,
) -> Result<NcclComm> {
    let (me, limit) = (host.rank(), host.timeout());
    let others = node.iter().map(|&rank| rank as usize).filter(|&rank| rank != me);
    let words: Vec<Word<T>> = others.map(|rank| Word::await_from(host, rank, limit + GRACE)).collect();
    let met = meeting.and_then(|meeting| wait(&meeting, &words, limit));

    let mut verdict = [if met.is_ok() { WELL } else { FAILED }];
    let tell = |to: &Word<T>, verdict: &mut [u8; 1]| {
        // SAFETY: `verdict` outlives the message, which is waited for here.
        let sent = unsafe { host.start_send(to.rank, TAG, DType::U8, Region::of(&mut verdict[..])) };
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
    let met = met?;
    told?;
    match words.iter().find(|word| word.says_failed()) {
        Some(word) => Err(left(word.rank)),
        None => Ok(met),
    }
}

fn wait<T: Transports>(meeting: &Meeting, words: &[Word<T>], limit: Duration) -> Result<NcclComm> {
    let since = Instant::now();
    loop {
        if let Some(met) = meeting.wait(STEP) {
            return met;
        }
        if let Some(word) = words.iter().find(|word| word.says_failed()) {
            return Err(left(word.rank));
        }
        if since.elapsed() > limit {
            let reason = format!(
                "not all of {} ranks of this node met within {:.0} s",
                words.len() + 1,
                limit.as_secs_f64()
            );
            return Err(Error::Transport { transport: "NCCL", reason });
        }
    }
}

fn left(rank: usize) -> Error {
    Error::Transport {
        transport: "NCCL",
        reason: format!("rank {rank} failed in meeting for NCCL; its own error says why"),
    }
}
